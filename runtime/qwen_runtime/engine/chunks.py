"""Where a prompt is cut. Knows no backend."""

from __future__ import annotations

__all__ = ["chunk_end"]


def chunk_end(start: int, length: int, want: int, size: int) -> int:
    """Where the chunk of a feed ends that begins at ``start``.

    Cuts are at multiples of ``size``, whatever else runs and wherever a reused beginning ends: so
    results cannot depend on load. No token is left alone (one rounds otherwise than several) and
    every cut is at an even place (kernels for 8-bit weights take tokens in pairs); the positions
    whose logits are wanted are in the last chunk, whole.

    Args:
        start: Tokens of the feed that have run or were found, an even number.
        length: Tokens of the feed.
        want: How many of the last positions' logits are wanted.
        size: Tokens of a chunk, an even number.

    Returns:
        The end, in start+1..length.
    """
    end = (start // size + 1) * size
    if end >= length:
        return length
    last = length - max(want, 2)
    if end > last:
        end = last - last % 2
    return end if end > start else length
