"""A runner and its slots, which several engines may use."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from qwen_runtime.backends.base import FloatArray, ModelRunner
from qwen_runtime.engine.slots import SlotManager
from qwen_runtime.errors import BackendError
from qwen_runtime.generation.base import Feed, RowCopy

__all__ = ["Model", "RowFeed"]


@dataclass(frozen=True, slots=True)
class RowFeed:
    """A feed and the slots of the request it belongs to."""

    slots: Sequence[int]
    feed: Feed
    copies: Sequence[RowCopy] = ()
    """What to copy between the request's rows before the feed runs."""


class Model:
    """A runner and the slots of its cache.

    One engine owns it; others may borrow slots, when it drafts for their model. Its lock is held
    for one call at a time and nothing else is locked meanwhile, so that two models may draft for
    each other without a deadlock.

    Args:
        runner: What executes the graphs.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._slots = SlotManager()
        self._lock = threading.Lock()
        self._num_borrowed = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def num_used_slots(self) -> int:
        """Slots in use, borrowed ones included."""
        return self._slots.num_used

    def allocate(self, count: int) -> list[int]:
        """Take free slots; `reserve` makes room for them."""
        with self._lock:
            return self._slots.allocate(count)

    def reserve(self) -> None:
        """Make room for all slots that are in use: once for many, as it may move the cache.

        Raises:
            BackendError: If the model is closed.
        """
        with self._lock:
            self._require_open()
            self._runner.allocate(self._slots.num_slots, max(self._runner.capacity, 1))

    def release(self, slots: Sequence[int]) -> None:
        """Forget what slots hold and give them back."""
        with self._lock:
            for slot in slots:
                if not self._closed and slot < self._runner.num_slots:
                    self._runner.truncate(slot, 0)
            self._slots.release(slots)

    def borrow(self, count: int) -> list[int]:
        """Take slots for a request of another engine, with room for them.

        Raises:
            BackendError: If the model is closed.
        """
        with self._lock:
            slots = self._slots.allocate(count)
            self._num_borrowed += 1
        try:
            self.reserve()
        except BaseException:
            self.give_back(slots)
            raise
        return slots

    def give_back(self, slots: Sequence[int]) -> None:
        """Return borrowed slots."""
        self.release(slots)
        with self._lock:
            self._num_borrowed -= 1

    def run(self, rows: Sequence[RowFeed], *, decode: bool) -> list[FloatArray]:
        """Copy between rows, then run feeds.

        Args:
            rows: What to run.
            decode: Whether every feed is one token whose logits are wanted.

        Returns:
            Logits [want, V] for every feed; those of a decode batch are valid until the next call.

        Raises:
            BackendError: If the model is closed or the engine fails.
            CapacityError: If a row would hold more than the bundle's limit.
        """
        with self._lock:
            self._require_open()
            runner = self._runner
            for row in rows:
                for copy in row.copies:
                    runner.copy(row.slots[copy.src], row.slots[copy.dst], copy.length)
                runner.truncate(row.slots[row.feed.row], row.feed.past)
            slots = [row.slots[row.feed.row] for row in rows]
            if not decode:
                return runner.prefill(
                    slots,
                    [row.feed.tokens for row in rows],
                    [row.feed.past for row in rows],
                    [row.feed.want for row in rows],
                )
            logits = runner.decode(slots, [int(row.feed.tokens[0]) for row in rows])
            # Another engine's call may come before these are read.
            return [row[None] for row in (logits.copy() if self._num_borrowed else logits)]

    def close(self) -> None:
        """Release the runner; safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._runner.close()

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError("the LLM is closed; open the bundle again")
