"""Which tokens of prompts share a call, so that no number depends on what it shares one with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from qwen_runtime.backends.base import IntArray

__all__ = ["cut", "uniform_runs"]


def cut(length: int, limit: int, block: int | None = None) -> list[tuple[int, int]]:
    """Cut a row of new tokens so that the cuts change no bit.

    One token rounds otherwise than several, so none is left alone, nor is the last of a call where
    attention takes ``block`` tokens at a time; a kernel for 8-bit weights takes tokens in pairs, so
    every cut is at an even place.

    Args:
        length: New tokens, at least 1.
        limit: Tokens of a call at most, even.
        block: Even, and at least 4; None where attention takes all at once.

    Returns:
        The first token of each call, and one past its last.
    """
    cuts = [*range(0, length, limit), length]
    if length % limit == 1 < length:
        cuts[-2] -= 2
    elif block is not None and length % limit % block == 1 < length:
        cuts.insert(-1, length - 3)
    return list(pairwise(cuts))


def uniform_runs(
    slots: Sequence[int],
    tokens: Sequence[IntArray],
    past: Sequence[int],
    want: Sequence[int],
    limit: int,
    *,
    fused: bool = False,
    block: int | None = None,
) -> Iterator[list[int]]:
    """Group rows: neighbouring slots, one length, one want and few tokens.

    Args:
        slots: Of each row.
        tokens: New ones of each row.
        past: Tokens that each row has.
        want: Logits wanted of each row.
        limit: Tokens of a group at most, unless it is one row.
        fused: Group rows of more than one token only where they begin and are not cut: attention
            takes several of them only so.
        block: As in `cut`.

    Yields:
        Indices of rows, by their slots.
    """
    run: list[int] = []
    for row in sorted(range(len(slots)), key=slots.__getitem__):
        last = run[-1] if run else None
        length = len(tokens[row])
        if last is not None and (
            slots[row] != slots[last] + 1
            or (len(run) + 1) * length > limit
            or length != len(tokens[last])
            or want[row] != want[last]
            or (fused and length > 1 and bool(past[row] or past[last]))
            or (fused and len(cut(length, limit, block)) > 1)
        ):
            yield run
            run = []
        run.append(row)
    if run:
        yield run
