"""Which slots a decode call runs: few sizes and places, so that few CUDA graphs serve them all."""

from __future__ import annotations

from qwen_runtime.backends.base import IntArray

__all__ = ["BLOCK_SIZES", "block_around", "rounded_slots"]

BLOCK_SIZES = (1, 2, 4, 8, 16, 32)
"""Rows of a decode call; all slots are one too."""


def rounded_slots(slots: int) -> int:
    """Slots to allocate for so many: as blocks need them, and few too many."""
    for size in BLOCK_SIZES:
        if slots <= size <= 8:
            return size
    return -(-slots // 8) * 8


def block_around(first: int, count: int, lengths: IntArray, max_context: int) -> tuple[int, int]:
    """The block that runs some neighbouring slots, as (first slot, slots).

    Idle slots in it run along: they write one token after what they hold, which nobody reads and
    their next real token overwrites. A full one cannot, so then the block is no larger than asked
    for.

    Args:
        first: First slot to run.
        count: How many, at most the largest block.
        lengths: Tokens of every slot.
        max_context: Tokens that fill a slot for good.
    """
    size = min(next(size for size in BLOCK_SIZES if size >= count), len(lengths))
    start = first - first % size
    if start + size < first + count:
        start = first
    start = min(start, len(lengths) - size)
    if (lengths[start : start + size] >= max_context).any():
        return first, count
    return start, size
