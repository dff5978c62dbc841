"""A runner and its slots, which several engines may use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from qwen_runtime.backends.base import FloatArray, ModelRunner
from qwen_runtime.cache import rounded_capacity
from qwen_runtime.engine.choosing import Chooser
from qwen_runtime.engine.chunks import chunk_end
from qwen_runtime.engine.compaction import Compactor
from qwen_runtime.engine.prefix import KEPT_SLOTS, MIN_SHARED, PrefixCache, shared_length
from qwen_runtime.engine.slots import SlotManager
from qwen_runtime.errors import BackendError, CapacityError
from qwen_runtime.generation.base import Feed, RowCopy

__all__ = ["Model", "RowFeed", "RowResult"]


@dataclass(frozen=True, slots=True)
class RowFeed:
    """A feed and the slots of the request it belongs to."""

    slots: list[int]
    """The request's own list: where one of its rows moves, its place here changes."""
    feed: Feed
    copies: Sequence[RowCopy] = ()
    """What to copy between the request's rows before the feed runs."""
    start: int = 0
    """Tokens of the feed that have run."""
    chunk_size: int | None = None
    """Where a prompt is cut; None runs it whole. See `chunk_end`."""

    @property
    def slot(self) -> int:
        """The slot that the feed is for."""
        return self.slots[self.feed.row]


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a feed brought."""

    logits: FloatArray | None
    """[want, V], or [1, 0] where the feed's `TokenChoice` has what it takes; None where tokens of
    the feed are still to run."""
    progress: int
    """Tokens of the feed that lie in the cache now."""
    num_cached: int = 0
    """Leading tokens that were not computed but taken from a slot that held them."""


class Model:
    """A runner and the slots of its cache.

    One engine owns it; others may borrow slots, when it drafts for their model. Its lock is held
    for one call at a time and nothing else is locked meanwhile, so that two models may draft for
    each other without a deadlock.

    A prompt whose beginning lies in some slot is computed from there on. Slots keep their tokens
    after their request for that, as long as nobody else needs them.

    Rows of a decode step that lie apart move together before it, into slots that hold nothing.

    Args:
        runner: What executes the graphs.
        kept_slots: How many slots keep their tokens; 0 computes every prompt whole.
    """

    def __init__(self, runner: ModelRunner, *, kept_slots: int = KEPT_SLOTS) -> None:
        self._runner = runner
        self._chooser = Chooser(runner)
        self._slots = SlotManager()
        self._prefixes = PrefixCache(kept_slots)
        self._compactor = Compactor()
        self._asked_slots = 0
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
            return self._take(count)

    def reserve(self) -> None:
        """Make room for all slots that are in use: once for many, as it may move the cache.

        Raises:
            BackendError: If the model is closed.
        """
        with self._lock:
            self._require_open()
            capacity = max(self._runner.capacity, 1)
            # Rows that moved together would have buffers shrink whenever load falls for a moment,
            # and grow slot by slot when it rises, each time by copying all.
            allocated = min(self._asked_slots - 1, self._runner.num_slots)
            slots = self._asked_slots = max(self._slots.num_slots, allocated)
            try:
                self._make_room(partial(self._runner.allocate, slots, capacity), capacity)
            except CapacityError:
                raise  # every slot in use is as before
            except BaseException:
                self._forget_all()
                raise

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back; what they hold may be kept until others need them."""
        with self._lock:
            self._release(slots)

    def borrow(self, count: int) -> list[int]:
        """Take slots for a request of another engine, with room for them.

        Raises:
            BackendError: If the model is closed.
        """
        with self._lock:
            slots = self._take(count)
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

    def run(self, rows: Sequence[RowFeed], *, decode: bool) -> list[RowResult]:
        """Copy between rows, then run feeds.

        Args:
            rows: What to run.
            decode: Whether every feed is one token whose logits are wanted.

        Returns:
            A result for every feed; logits of a decode batch are valid until the next call.

        Raises:
            BackendError: If the model is closed or the engine fails.
            CapacityError: If a row would hold more than the bundle's limit, or more than there is
                memory for, kept slots given back.
        """
        with self._lock:
            self._require_open()
            try:
                for row in rows:
                    for copy in row.copies:
                        self._copy(row.slots[copy.src], row.slots[copy.dst], copy.length)
                return self._decode(rows) if decode else self._prefill(rows)
            except BaseException:
                # A call that did not end may have written, or moved the cache.
                self._forget_all()
                raise

    def close(self) -> None:
        """Release the runner; safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._prefixes.clear()
                self._runner.close()

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError("the LLM is closed; open the bundle again")

    def _take(self, count: int) -> list[int]:
        """Take free slots, those that hold something last."""
        if not self._slots.num_used:
            self._asked_slots = 0
        return self._slots.allocate(count, self._kept(), self._prefixes.max_slots)

    def _release(self, slots: Sequence[int]) -> None:
        self._slots.release(slots)
        for slot in sorted(slots, reverse=True):  # of equal ones the lowest stays
            self._truncate(slot, self._prefixes.keep(slot))
            for covered in self._prefixes.covered_by(slot, self._kept()):
                self._drop(covered)

    def _make_room(self, grow: Callable[[], None], capacity: int) -> None:
        """Have the runner's buffers grow; where memory runs out, over the slots in use alone.

        Args:
            grow: Grows them, kept slots and all.
            capacity: Tokens that a slot must hold.

        Raises:
            CapacityError: If there is too little memory for the slots in use.
        """
        try:
            grow()
        except CapacityError:
            for slot in self._kept():
                self._drop(slot)
            self._runner.allocate(self._slots.num_slots, capacity)

    def _make_room_for_prompts(self, rows: Collection[RowFeed], ends: Sequence[int]) -> None:
        """Make room for a chunk of rows' feeds, which ends at ``ends`` of them.

        What the rows take from kept slots is copied already, so those may be dropped. Buffers
        follow the chunks, a quarter at a time, and shrink only where they would not grow again for
        the rest of these prompts.
        """
        whole = max(row.feed.past + len(row.feed.tokens) for row in rows)
        reach = max(row.feed.past + end for row, end in zip(rows, ends, strict=True))
        # A slot that is full to the last token splits the calls of rows around it.
        end = min(whole, reach + 1)
        capacity = self._runner.capacity
        if capacity > 2 * rounded_capacity(whole):
            self._make_room(partial(self._runner.allocate, self._runner.num_slots, end), end)
        elif capacity < end:
            ahead = max(end, min(whole, capacity + capacity // 4))
            self._make_room(partial(self._runner.grow, ahead), end)

    def _decode(self, rows: Sequence[RowFeed]) -> list[RowResult]:
        for row in rows:
            self._truncate(row.slot, row.feed.past)
        self._gather(rows)
        slots = [row.slot for row in rows]
        longest = max(row.feed.past for row in rows) + 1
        # Twice is when buffers shrink: less would make no step cheaper.
        for slot in self._prefixes.charge(self._kept(), 2 * rounded_capacity(longest)):
            self._drop(slot)
        self._make_room(partial(self._runner.allocate, self._runner.num_slots, longest), longest)
        tokens = [int(row.feed.tokens[0]) for row in rows]
        found = self._chooser.decode(slots, tokens, [row.feed.choice for row in rows])
        if found is None:
            found = [values[None] for values in self._runner.decode(slots, tokens)]
        if self._num_borrowed:  # another engine's call may come before these are read
            found = [values.copy() for values in found]
        return [RowResult(values, progress=1) for values in found]

    def _gather(self, rows: Sequence[RowFeed]) -> None:
        """Move rows of a decode step that lie apart together."""
        lengths = {row.slot: row.feed.past for row in rows}
        if self._compactor.due(lengths):
            empty = self._slots.empty(self._runner.num_slots, self._kept())
            moves = dict(self._compactor.moves(lengths, empty))
            for row in rows:
                if row.slot in moves:
                    self._move(row, moves[row.slot])

    def _move(self, row: RowFeed, slot: int) -> None:
        """Move a row to an empty slot; what the one it leaves is known to begin with may be kept."""
        before = row.slot
        self._slots.take(slot)
        try:
            self._copy(before, slot, row.feed.past)
            row.slots[row.feed.row] = slot
        finally:  # an interrupted copy leaves the row where it was
            self._release([before if row.slot == slot else slot])

    def _prefill(self, rows: Sequence[RowFeed]) -> list[RowResult]:
        """Run a chunk of feeds; those that begin like another one only after all of it."""
        results: dict[int, RowResult] = {}
        waiting, unfinished = dict(enumerate(rows)), list[RowFeed]()
        while wave := self._independent(waiting, unfinished):
            starts = [self._begin(row) for row in wave.values()]
            ends = [_end(row, start) for row, start in zip(wave.values(), starts, strict=True)]
            spans = list(zip(wave.items(), starts, ends, strict=True))
            self._make_room_for_prompts(wave.values(), ends)
            logits = self._runner.prefill(
                [row.slot for row in wave.values()],
                [row.feed.tokens[start:end] for (_, row), start, end in spans],
                [row.feed.past + start for (_, row), start, _ in spans],
                [row.feed.want * _is_last(row, end) for (_, row), _, end in spans],
            )
            for ((index, row), start, end), values in zip(spans, logits, strict=True):
                self._prefixes.wrote(row.slot, row.feed.past + start, row.feed.tokens[start:end])
                last = _is_last(row, end)
                found = 0 if row.start else start
                results[index] = RowResult(values if last else None, end, found)
                del waiting[index]
                if not last:
                    unfinished.append(row)
        return [
            results[index] if index in results else RowResult(None, rows[index].start)
            for index in range(len(rows))
        ]

    def _independent(
        self, rows: dict[int, RowFeed], unfinished: Sequence[RowFeed]
    ) -> dict[int, RowFeed]:
        """Feeds that gain nothing by waiting for another of them, or for an unfinished one."""
        if not self._prefixes.max_slots or len(rows) + len(unfinished) <= 1:
            return dict(rows)
        now: dict[int, RowFeed] = {}
        leaders = {_beginning(row): row for row in unfinished}
        for index, row in rows.items():
            limit = _reusable(row.feed)
            if limit >= MIN_SHARED and not row.start:
                tokens = row.feed.tokens
                leader = leaders.setdefault(_beginning(row), row)
                if leader is not row:
                    shared = min(shared_length(leader.feed.tokens, tokens), limit)
                    if shared >= self._prefixes.find(tokens, limit, near=row.slot)[1] + MIN_SHARED:
                        continue
            elif row.start:
                leaders.setdefault(_beginning(row), row)
            now[index] = row
        return now

    def _begin(self, row: RowFeed) -> int:
        """Make a feed's slot ready; returns how many of the feed's tokens it then holds."""
        limit = _reusable(row.feed)
        if limit < MIN_SHARED or row.start:
            self._truncate(row.slot, row.feed.past + row.start)
            return row.start
        source, length = self._prefixes.find(row.feed.tokens, limit, near=row.slot)
        if source == row.slot:
            self._truncate(row.slot, length)
        else:
            self._copy(source, row.slot, length)
        return length

    def _copy(self, src: int, dst: int, length: int) -> None:
        self._prefixes.forget(dst)
        self._runner.copy(src, dst, length)
        self._prefixes.copied(src, dst, length)

    def _truncate(self, slot: int, length: int) -> None:
        self._prefixes.truncate(slot, length)
        if not self._closed and slot < self._runner.num_slots:
            self._runner.truncate(slot, length)

    def _kept(self) -> list[int]:
        """Free slots that hold tokens, the one untouched for longest first."""
        return self._prefixes.kept(self._slots.used)

    def _drop(self, slot: int) -> None:
        self._prefixes.forget(slot)
        self._truncate(slot, 0)

    def _forget_all(self) -> None:
        """Know nothing about any slot; free ones are empty then."""
        for slot in self._kept():
            self._drop(slot)
        self._prefixes.clear()


def _reusable(feed: Feed) -> int:
    """How many tokens of a feed may come from another slot.

    Not the wanted positions, and one of two: computed alone the last token would differ in bits.
    """
    return 0 if feed.past else len(feed.tokens) - max(feed.want, 2)


def _beginning(row: RowFeed) -> bytes:
    return row.feed.tokens[:MIN_SHARED].tobytes()


def _end(row: RowFeed, start: int) -> int:
    """Where the chunk of a feed ends that begins at ``start``."""
    length = len(row.feed.tokens)
    if row.chunk_size is None:
        return length
    return chunk_end(start, length, row.feed.want, row.chunk_size)


def _is_last(row: RowFeed, end: int) -> bool:
    return end == len(row.feed.tokens)
