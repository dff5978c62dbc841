"""The lock between steps: in the order of asking, and sound whatever interrupts it."""

from __future__ import annotations

import threading
import time

import pytest

from qwen_runtime.engine.fair_lock import FairLock


def test_lock_goes_to_who_waited_longest() -> None:
    lock, order = FairLock(), list[int]()
    lock.acquire()

    def ask(index: int) -> None:
        lock.acquire()
        order.append(index)
        lock.release()

    threads = []
    for index in range(5):
        threads.append(threading.Thread(target=ask, args=(index,)))
        threads[-1].start()
        while len(lock._queue) <= index:
            time.sleep(0.001)
    lock.release()
    # Who has just released it is behind them all.
    lock.acquire()
    order.append(5)
    lock.release()
    for thread in threads:
        thread.join(timeout=30)

    assert order == [0, 1, 2, 3, 4, 5]


def test_lock_is_taken_again_by_its_holder_and_by_nobody_else() -> None:
    lock, got = FairLock(), list[bool]()
    assert lock.acquire()
    assert lock.acquire(blocking=False)
    lock.release()

    other = threading.Thread(target=lambda: got.append(lock.acquire(blocking=False)))
    other.start()
    other.join()
    lock.release()

    assert got == [False]
    with pytest.raises(AssertionError, match="released by the thread that holds it"):
        lock.release()


@pytest.mark.parametrize("handed_over", [False, True])
def test_interruption_while_waiting_for_the_lock_loses_no_turn(
    monkeypatch: pytest.MonkeyPatch, handed_over: bool
) -> None:
    lock, outcome = FairLock(), list[str]()
    lock.acquire()

    class Interrupted:
        def __init__(self) -> None:
            self.given = threading.Event()
            self.first = True

        def acquire(self) -> None:
            if self.first:
                self.first = False
                return
            if handed_over:
                self.given.wait(timeout=30)
            raise KeyboardInterrupt

        def release(self) -> None:
            self.given.set()

    def ask() -> None:
        try:
            lock.acquire()
        except KeyboardInterrupt:
            outcome.append("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr("qwen_runtime.engine.fair_lock.Lock", Interrupted)
        thread = threading.Thread(target=ask)
        thread.start()
        while handed_over and not lock._queue:
            time.sleep(0.001)
        if handed_over:
            lock.release()
        thread.join(timeout=30)
    if not handed_over:
        lock.release()

    assert outcome == ["interrupted"]
    assert lock.acquire(blocking=False)


@pytest.mark.parametrize("taken_before", [0, 1])
def test_lock_is_given_back_when_it_is_unknown_whether_it_was_taken(taken_before: int) -> None:
    lock = FairLock()
    for _ in range(taken_before):
        lock.acquire()
    before = lock.depth

    lock.release_to(before)
    assert lock.depth == taken_before
    lock.acquire()
    lock.release_to(before)
    assert lock.depth == taken_before


def test_interruption_right_after_the_lock_was_taken_leaves_it_free() -> None:
    class Interrupting:
        """A mutex: the signal comes as it is left for the first time."""

        def __init__(self) -> None:
            self.left = 0

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            self.left += 1
            if self.left == 1:
                raise KeyboardInterrupt

    lock = FairLock()
    lock._mutex = Interrupting()

    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    assert lock._owner is None
