"""How two sets of logits are compared: one metric, one table of tolerances, for build and check.

Pure NumPy, so that a device without PyTorch judges a bundle by the rule it was built under.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.base import FloatArray, IntArray

__all__ = ["TIE_FACTOR", "TOLERANCES", "Comparison", "Tolerance", "compare", "tolerance_for"]

TIE_FACTOR = 10.0
"""A token that differs is a tie where the reference's two best logits are closer than this many
times the position's largest difference, itself within the tolerance: rounding decides there."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How large a logit error may be."""

    logit_error: float
    """Largest max|difference| / max|reference| of a position, for models of ``layers`` layers."""
    layers: int
    """Depth up to which ``logit_error`` holds as it stands."""
    reason: str

    def at_depth(self, num_layers: int) -> float:
        """The tolerance of a model of so many layers.

        Each layer adds rounding errors to the residual stream that are independent of the
        others', so their sum grows with the square root of the depth.
        """
        return self.logit_error * math.sqrt(max(1.0, num_layers / self.layers))


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(
        1e-4,
        8,
        "both sides round to 24 bits (6e-8) and only sum in another order, which has cost up to "
        "7e-6 on the models measured, while a wrong rotation or a lost token costs 0.1 and more",
    ),
}
"""By compute dtype."""


def tolerance_for(compute_dtype: str, num_layers: int) -> float:
    """The tolerance for a bundle.

    Args:
        compute_dtype: Format of its activations, as in its manifest.
        num_layers: Its depth.

    Raises:
        KeyError: If no tolerance was ever argued for ``compute_dtype``.
    """
    return TOLERANCES[compute_dtype].at_depth(num_layers)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two sets of logits, position by position; every array is [n]."""

    errors: npt.NDArray[np.float64]
    """max|difference| / max|reference|; infinite where a logit is not finite."""
    differences: npt.NDArray[np.float64]
    """max|difference|."""
    tokens: IntArray
    """Our greedy token."""
    reference_tokens: IntArray
    """The reference's greedy token."""
    ties: npt.NDArray[np.bool_]
    """Tokens that differ within the tolerance, where rounding decides."""
    failed: npt.NDArray[np.bool_]
    """Positions whose error passes the tolerance, or whose token differs and is no tie."""


def compare(
    logits: FloatArray,
    reference: FloatArray,
    *,
    tolerance: float,
    tokens: IntArray | None = None,
    reference_tokens: IntArray | None = None,
    scales: FloatArray | None = None,
) -> Comparison:
    """Compare logits with a reference.

    Args:
        logits: Ours, [n, V]; or those of the reference's top tokens only.
        reference: The reference's, same shape and order; at least its two largest are in it.
        tolerance: Largest error of a position.
        tokens: Our greedy tokens [n]; None takes them from ``logits``.
        reference_tokens: The reference's greedy tokens [n]; None takes them from ``reference``.
        scales: max|reference| over the whole vocabulary [n]; None takes it from ``reference``.

    Returns:
        Errors, tokens and verdict of every position.
    """
    difference = np.abs(logits - reference).max(axis=1).astype(np.float64)
    difference[~np.isfinite(difference)] = np.inf
    scale = np.abs(reference).max(axis=1) if scales is None else scales
    # A reference of zeros alone allows no difference at all.
    smallest = np.finfo(np.float64).tiny
    errors = difference / np.maximum(scale.astype(np.float64), smallest)
    ours = np.argmax(logits, axis=1) if tokens is None else tokens
    theirs = np.argmax(reference, axis=1) if reference_tokens is None else reference_tokens
    differ = ours != theirs
    within = errors <= tolerance
    ties = differ & within & (_gap(reference) < TIE_FACTOR * difference)
    failed = ~within | (differ & ~ties)
    return Comparison(errors, difference, ours, theirs, ties, failed)


def _gap(reference: FloatArray) -> npt.NDArray[np.float64]:
    """Distance between the two largest logits, [n]; infinite for a vocabulary of one token."""
    if reference.shape[1] < 2:
        return np.full(len(reference), np.inf)
    best = np.partition(reference, -2, axis=1)[:, -2:].astype(np.float64)
    return np.asarray(best[:, 1] - best[:, 0])
