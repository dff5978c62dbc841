"""Observations against the reference: one pass over the vocabulary, all cases together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qwen_export.parity.observations import Observations
from qwen_runtime.backends.base import FloatArray, IntArray
from qwen_runtime.comparison import compare

__all__ = ["Judged", "TopLogits", "judge"]

BLOCK_BYTES = 256 << 20
"""Reference logits in memory at a time."""
TOP_K = 16
"""Logits kept for every position: the tokens that sampling could choose, and the runners-up."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One case on one row; arrays are [n]."""

    case: str
    row: int
    positions: IntArray
    errors: npt.NDArray[np.float64]
    tokens: IntArray
    reference_tokens: IntArray
    ties: npt.NDArray[np.bool_]
    failed: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TopLogits:
    """The reference's best logits at every judged position of a row."""

    positions: IntArray
    """[n], sorted."""
    tokens: IntArray
    """Best first, [n, k]."""
    logits: FloatArray
    """[n, k]."""
    scales: FloatArray
    """max|logit|, [n]."""


def judge(
    seen: Observations,
    hidden: Sequence[torch.Tensor],
    project: Callable[[torch.Tensor], FloatArray],
    vocab_size: int,
    tolerance: float,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[list[Judged], list[TopLogits]]:
    """Compare every observation.

    Args:
        seen: What the bundle gave.
        hidden: The reference's hidden states of each row at ``seen.positions(row)``, [n, E].
        project: Hidden states [n, E] to logits [n, V].
        vocab_size: V.
        tolerance: Largest error of a position.
        advance: Called with the number of reference positions done since the last call.

    Returns:
        One entry for each case and row, by order of observation, and the reference's best logits
        of each row.
    """
    keys = [(row, int(p)) for row in range(len(hidden)) for p in seen.positions(row)]
    place = {key: i for i, key in enumerate(keys)}
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    observations = list(seen)
    for number, item in enumerate(observations):
        for index, position in enumerate(item.positions):
            wanted[place[item.row, int(position)]].append((number, index))
    states = torch.cat(list(hidden))
    block = max(1, BLOCK_BYTES // (4 * vocab_size))
    results: dict[tuple[str, int], list[tuple[float, ...]]] = defaultdict(list)
    tops: list[tuple[IntArray, FloatArray, np.float32]] = []
    for start in range(0, len(keys), block):
        logits = project(states[start : start + block])
        for offset, reference in enumerate(logits):
            tops.append(_top(reference))
            pairs = wanted[start + offset]
            ours = np.stack([seen.read(observations[n], index) for n, index in pairs])
            found = compare(ours, np.broadcast_to(reference, ours.shape), tolerance=tolerance)
            columns = (
                found.errors,
                found.tokens,
                found.reference_tokens,
                found.ties,
                found.failed,
            )
            for i, (number, _) in enumerate(pairs):
                item = observations[number]
                position = keys[start + offset][1]
                results[item.case, item.row].append((position, *(c[i] for c in columns)))
        advance(len(logits))
    judged = [_judged(case, row, found) for (case, row), found in results.items()]
    return judged, _tops(seen, len(hidden), tops)


def _judged(case: str, row: int, found: list[tuple[float, ...]]) -> Judged:
    positions, errors, tokens, reference_tokens, ties, failed = zip(*found, strict=True)
    return Judged(
        case,
        row,
        np.array(positions, np.int64),
        np.array(errors, np.float64),
        np.array(tokens, np.int64),
        np.array(reference_tokens, np.int64),
        np.array(ties, np.bool_),
        np.array(failed, np.bool_),
    )


def _top(logits: FloatArray) -> tuple[IntArray, FloatArray, np.float32]:
    count = min(TOP_K, len(logits))
    best = np.argpartition(-logits, count - 1)[:count]
    # Equal logits: the lower id first, as argmax chooses.
    best = best[np.lexsort((best, -logits[best]))]
    return best, logits[best], np.abs(logits).max()


def _tops(
    seen: Observations, num_rows: int, tops: list[tuple[IntArray, FloatArray, np.float32]]
) -> list[TopLogits]:
    result, start = [], 0
    for row in range(num_rows):
        positions = seen.positions(row)
        tokens, logits, scales = zip(*tops[start : start + len(positions)], strict=True)
        start += len(positions)
        result.append(
            TopLogits(positions, np.stack(tokens), np.stack(logits), np.array(scales, np.float32))
        )
    return result
