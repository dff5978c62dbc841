"""Which calls run what was asked for on a GPU: as few as the graphs and the cache allow.

Knows neither engines nor buffers. Of every row of a call, what the slot holds and the call's new
tokens, padding included, fit in the cache: one row past it would corrupt others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen_runtime.backends.base import IntArray

__all__ = ["CallLimits", "PrefillCall", "PrefillRow", "RowChunk", "decode_spans", "prefill_calls"]

MAX_PADDING = 2
"""A call computes at most so many times the tokens its rows have; beyond, they run apart."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What one call can do."""

    capacity: int
    """Tokens a row can hold."""
    max_batch: int
    max_sequence: int
    """New tokens per row."""
    max_num_logits: int
    """Positions per row whose logits come back."""
    max_tokens: int | None = None
    """New tokens of all rows, padding included; None for no other limit."""
    max_logits: int | None = None
    """Positions of all rows whose logits come back; None for no other limit."""
    uniform: bool = False
    """Whether several rows share a call only where all begin at 0 and bring equally many tokens."""


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """New tokens of one slot."""

    index: int
    """Which of the caller's rows it is."""
    slot: int
    past: int
    """Tokens the slot holds before them."""
    length: int
    """How many they are."""
    want: int
    """How many of the last ones need logits."""


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Tokens ``start`` to ``stop - 1`` of a row."""

    row: PrefillRow
    start: int
    stop: int

    @property
    def length(self) -> int:
        """New tokens."""
        return self.stop - self.start

    @property
    def past(self) -> int:
        """Tokens the slot holds before them."""
        return self.row.past + self.start

    @property
    def wanted(self) -> range:
        """Positions within the chunk whose logits are needed."""
        first = max(self.row.length - self.row.want, self.start)
        return range(min(first, self.stop) - self.start, self.length)


@dataclass(frozen=True, slots=True)
class PrefillCall:
    """One call: chunks of rows in neighbouring slots, padded to the longest."""

    chunks: tuple[RowChunk, ...]

    @property
    def first_slot(self) -> int:
        """Slot of the first row."""
        return self.chunks[0].row.slot

    @property
    def sequence(self) -> int:
        """New tokens per row, padding included."""
        return max(chunk.length for chunk in self.chunks)

    @property
    def num_logits(self) -> int:
        """Positions per row; engines take no empty tensor, so at least one."""
        return max(1, *(len(chunk.wanted) for chunk in self.chunks))

    def takes(self, chunk: RowChunk, limits: CallLimits) -> bool:
        """Whether a further row fits in."""
        wider = PrefillCall((*self.chunks, chunk))
        sequence, num_rows = wider.sequence, len(wider.chunks)
        computed = sum(each.length for each in wider.chunks)
        if limits.uniform and (
            any(each.past for each in wider.chunks) or computed < sequence * num_rows
        ):
            return False
        if limits.max_tokens is not None and sequence * num_rows > limits.max_tokens:
            return False
        if limits.max_logits is not None and wider.num_logits * num_rows > limits.max_logits:
            return False
        return (
            chunk.row.slot == self.chunks[-1].row.slot + 1
            and num_rows <= limits.max_batch
            and sequence * num_rows <= MAX_PADDING * computed
            and all(each.past + sequence <= limits.capacity for each in wider.chunks)
        )


def prefill_calls(rows: Sequence[PrefillRow], limits: CallLimits) -> Iterator[PrefillCall]:
    """Calls that run rows of new tokens, in an order that keeps each row's chunks in sequence.

    Args:
        rows: Distinct slots; past + length is within the capacity.
        limits: Of one call.
    """
    done = {row.index: 0 for row in rows}
    waiting = sorted(rows, key=lambda row: row.slot)
    while waiting:
        call: PrefillCall | None = None
        for row in waiting:
            chunk = _next_chunk(row, done[row.index], limits)
            done[row.index] = chunk.stop
            if call is None:
                call = PrefillCall((chunk,))
            elif call.takes(chunk, limits):
                call = PrefillCall((*call.chunks, chunk))
            else:
                yield call
                call = PrefillCall((chunk,))
        if call is not None:
            yield call
        waiting = [row for row in waiting if done[row.index] < row.length]


def _next_chunk(row: PrefillRow, start: int, limits: CallLimits) -> RowChunk:
    first_wanted = max(row.length - row.want, start)
    stop = min(row.length, start + limits.max_sequence, first_wanted + limits.max_num_logits)
    return RowChunk(row, start, stop)


def decode_spans(
    slots: Sequence[int], lengths: IntArray, limits: CallLimits
) -> Iterator[tuple[int, int]]:
    """Spans of slots that one decode call each covers, as (first slot, slots).

    Idle slots between running ones run along: a row more costs a GPU little, a call streams all
    weights. They write one token after what they hold, which their next real token overwrites, so
    a full one cannot.

    Args:
        slots: Running slots, ascending; each has room for a token.
        lengths: Tokens of every slot.
        limits: Of one call.
    """
    first = last = slots[0]
    for slot in slots[1:]:
        full = (lengths[last + 1 : slot] >= limits.capacity).any()
        if full or slot - first >= limits.max_batch:
            yield first, last - first + 1
            first = slot
        last = slot
    yield first, last - first + 1
