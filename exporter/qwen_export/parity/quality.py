"""How good a quantised bundle is, as it is served: against the original it was made from.

Whether the graph is right is proved elsewhere, by exact arithmetic; here the original's weights
are compared with the quantised ones, and int8 activations with fp32 ones.

Shape letters: V vocab_size, E hidden_size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from qwen_export.parity.case_table import SERVED
from qwen_export.parity.observations import Observation, Observations
from qwen_runtime.backends.base import FloatArray
from qwen_runtime.check import MAX_SERVED_ERROR
from qwen_runtime.comparison import compare
from qwen_runtime.manifest import QualitySummary

__all__ = ["MAX_KL_SHARE", "Projected", "Quality", "finite", "measure_quality"]

Logs = npt.NDArray[np.float64]

BLOCK_BYTES = 128 << 20
"""Logits of one kind in memory at a time."""
MAX_KL_SHARE = 0.5
"""Largest mean divergence from the original, as a share of what the original's predictions know
from their contexts. A broken table or kernel answers without regard to the context, and then no
guess is closer to the original than the whole of that."""


@dataclass(frozen=True, slots=True)
class Projected:
    """A model that has run over the rows."""

    hidden: Sequence[torch.Tensor]
    """Hidden states of each row at the positions served, [n, E]."""
    project: Callable[[torch.Tensor], FloatArray]
    """Hidden states [n, E] to logits [n, V]."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The served bundle against the original, over all positions."""

    positions: int
    mean_kl: float
    """Mean KL(original || served) of the next token's distribution, in nats."""
    max_kl: float
    context_kl: float
    """Mean KL of the original's predictions from their own average: what they know from their
    contexts, and the least that answers which ignore the context would cost."""
    top1_agreement: float
    """Share of positions at which both choose the same token."""
    mean_logit_error: float
    """Of max|difference| / max|original|."""
    max_logit_error: float
    exact_mean_kl: float
    """Mean KL(original || exact): what the weights alone cost, with fp32 activations."""
    mean_served_error: float
    """Of max|difference| / max|exact| between served and exact: what int8 activations cost, or the
    compute dtype of a device."""
    max_served_error: float

    @property
    def problem(self) -> str | None:
        """What shows a broken bundle, in words; None if nothing does."""
        if not self.mean_kl <= MAX_KL_SHARE * self.context_kl:
            return (
                f"as served, the bundle's predictions are {self.mean_kl:.3g} nats from the "
                f"original's on average, more than {MAX_KL_SHARE:g} times the "
                f"{self.context_kl:.3g} that ignoring the context would cost"
            )
        if not self.mean_served_error <= MAX_SERVED_ERROR:
            return (
                f"rounding changes the logits that are served by {self.mean_served_error:.2g} of the "
                f"largest on average, more than {MAX_SERVED_ERROR:g}"
            )
        return None

    def summary(self) -> QualitySummary:
        """The manifest's entry."""
        return QualitySummary(
            self.positions,
            finite(self.mean_kl),
            finite(self.max_kl),
            self.top1_agreement,
            finite(self.max_logit_error),
            finite(self.max_served_error),
            finite(self.mean_served_error),
        )


def measure_quality(seen: Observations, original: Projected, exact: Projected) -> Quality:
    """Compare what the bundle gave as it is served with two references.

    Args:
        seen: Holds the served logits, under `SERVED`.
        original: The checkpoint.
        exact: The checkpoint with the bundle's weights.
    """
    places = [_places(seen, row) for row in range(len(original.hidden))]
    flat = [place for row in places for place in row]
    theirs, ours = torch.cat(list(original.hidden)), torch.cat(list(exact.hidden))
    step = max(1, BLOCK_BYTES // (4 * seen.vocab_size))
    found = _Found()
    for start in range(0, len(flat), step):
        block = slice(start, start + step)
        projected = (original.project(theirs[block]), exact.project(ours[block]))
        for index, (truth, computed) in enumerate(zip(*projected, strict=True), start):
            found.add(seen.read(*flat[index]), truth, computed)
    return found.quality()


def finite(error: float) -> float:
    """An error as the manifest can hold it: what is not finite is the largest float."""
    return error if math.isfinite(error) else sys.float_info.max


class _Found:
    """Numbers of every position."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        self.exact_kl: list[float] = []
        self.negative_entropy: list[float] = []
        self.probabilities: npt.NDArray[np.float64] | None = None
        self.errors: list[float] = []
        self.served_errors: list[float] = []
        self.agree: list[bool] = []

    def add(self, served: FloatArray, original: FloatArray, exact: FloatArray) -> None:
        """One position, [V] each."""
        truth = _log_softmax(original)
        probabilities = np.exp(truth)
        self.kl.append(_divergence(truth, _log_softmax(served)))
        self.exact_kl.append(_divergence(truth, _log_softmax(exact)))
        self.negative_entropy.append(float(np.dot(probabilities, truth)))
        if self.probabilities is None:
            self.probabilities = probabilities
        else:
            self.probabilities += probabilities
        self.errors.append(_error(served, original))
        self.served_errors.append(_error(served, exact))
        self.agree.append(bool(np.argmax(served) == np.argmax(original)))

    def context_kl(self) -> float:
        """Mean KL from the average prediction; infinite where there is one position only."""
        count = len(self.negative_entropy)
        if self.probabilities is None or count < 2:
            return float("inf")
        average = self.probabilities / count
        known = average[average > 0]
        return float(np.mean(self.negative_entropy) - np.dot(known, np.log(known)))

    def quality(self) -> Quality:
        """The summary."""
        return Quality(
            positions=len(self.kl),
            mean_kl=float(np.mean(self.kl)),
            max_kl=float(np.max(self.kl)),
            context_kl=self.context_kl(),
            top1_agreement=float(np.mean(self.agree)),
            mean_logit_error=float(np.mean(self.errors)),
            max_logit_error=float(np.max(self.errors)),
            exact_mean_kl=float(np.mean(self.exact_kl)),
            mean_served_error=float(np.mean(self.served_errors)),
            max_served_error=float(np.max(self.served_errors)),
        )


def _places(seen: Observations, row: int) -> list[tuple[Observation, int]]:
    """Where a row's served logits lie, in the order of their positions."""
    found = [
        (int(position), item, index)
        for item in seen
        if (item.case, item.row) == (SERVED, row)
        for index, position in enumerate(item.positions)
    ]
    return [(item, index) for _, item, index in sorted(found, key=lambda each: each[0])]


def _divergence(truth: Logs, other: Logs) -> float:
    """KL(truth || other) of two distributions given as logarithms, in nats; never negative."""
    value = float(np.dot(np.exp(truth), truth - other))
    # Rounding may leave a little less than nothing; a NaN stays one.
    return 0.0 if value < 0 else value


def _log_softmax(logits: FloatArray) -> Logs:
    shifted = logits.astype(np.float64) - float(logits.max())
    values: Logs = shifted - np.log(np.exp(shifted).sum())
    return values


def _error(logits: FloatArray, reference: FloatArray) -> float:
    comparison = compare(logits[None], reference[None], tolerance=0.0)
    return float(comparison.errors[0])
