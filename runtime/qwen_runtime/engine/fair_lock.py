"""A lock that is given to whoever has waited longest."""

from __future__ import annotations

from collections import deque
from threading import Lock, get_ident

__all__ = ["FairLock"]


class FairLock:
    """A re-entrant lock, handed over in the order of asking.

    `threading.Lock` goes to whoever runs: a thread that releases it between two steps and takes it
    again for the next one keeps all others out for as long as it has work.
    """

    def __init__(self) -> None:
        self._mutex = Lock()
        self._queue: deque[tuple[int, Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self, *, blocking: bool = True) -> bool:
        """Take the lock, once more if this thread has it; False if it is not free at once."""
        me, before = get_ident(), self.depth
        turn = Lock()
        try:
            with self._mutex:
                if self._owner in (None, me):
                    self._owner = me
                    self._depth += 1
                    return True
                if not blocking:
                    return False
                turn.acquire()
                self._queue.append((me, turn))
            turn.acquire()
        except BaseException:  # an interruption before, while or just after it waits
            with self._mutex:
                if (me, turn) in self._queue:
                    self._queue.remove((me, turn))
            self.release_to(before)
            raise
        return True

    @property
    def depth(self) -> int:
        """How often the calling thread has taken it."""
        return self._depth if self._owner == get_ident() else 0

    def release(self) -> None:
        """Give the lock back; called as often as it was taken."""
        if not (depth := self.depth):
            raise AssertionError("a lock is released by the thread that holds it")
        self.release_to(depth - 1)

    def release_to(self, depth: int) -> None:
        """Give the lock back until the calling thread has it as often as before.

        Right too where an interruption left it unknown whether the lock was taken.

        Args:
            depth: `depth` as it was before; where it is no more now, there is nothing to do.
        """
        with self._mutex:
            if self._owner == get_ident() and self._depth > depth:
                self._depth = depth
                if not depth:
                    self._hand_over()

    def _hand_over(self) -> None:
        if self._queue:
            self._owner, turn = self._queue.popleft()
            self._depth = 1
            turn.release()
        else:
            self._owner, self._depth = None, 0
