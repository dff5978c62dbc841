"""What 16-bit arithmetic costs a model: transformers in that type against transformers in fp32.

Models differ: on the embedded one bf16 changes logits by 0.02 of the largest, on random weights by
0.1 to 0.7. So a device in 16 bits is measured by what PyTorch itself loses on the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from qwen_export.parity.quality import Projected
from qwen_runtime.backends.base import FloatArray
from qwen_runtime.comparison import Tolerance

__all__ = ["MOST", "MULTIPLE", "TORCH_DTYPES", "allowed_error", "largest_error"]

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types that round enough to be measured, by the names users know."""
MULTIPLE = 2.0
"""A device sums in another order than PyTorch, so its rounding falls on other positions: its largest
error may be this many times PyTorch's."""
MOST = 0.5
"""No error beyond this is allowed, whatever PyTorch's: two unrelated answers are about 1 apart."""
_BLOCK_BYTES = 128 << 20


def allowed_error(tolerance: Tolerance, num_layers: int, measured: float | None) -> float:
    """The largest error a position may have.

    Args:
        tolerance: Of the compute dtype.
        num_layers: The model's depth.
        measured: PyTorch's largest error in that type; None where nothing was measured.
    """
    usual = tolerance.at_depth(num_layers)
    # PyTorch in fp16 overflows on some models; that is no scale for a device that does not.
    if measured is None or not math.isfinite(measured):
        return usual
    return max(usual, min(MULTIPLE * measured, MOST))


def largest_error(exact: Projected, rounded: Projected, vocab_size: int) -> float:
    """Largest max|difference| / max|exact| of any position; infinite where it is not a number."""
    theirs, ours = torch.cat(list(exact.hidden)), torch.cat(list(rounded.hidden))
    step = max(1, _BLOCK_BYTES // (4 * vocab_size))
    errors: list[float] = []
    for start in range(0, len(theirs), step):
        block = slice(start, start + step)
        errors += _errors(exact.project(theirs[block]), rounded.project(ours[block]))
    return max(errors)


def _errors(exact: FloatArray, rounded: FloatArray) -> Sequence[float]:
    difference = np.abs(rounded - exact).max(axis=1)
    difference[~np.isfinite(difference)] = np.inf
    smallest = np.finfo(np.float32).tiny
    found: list[float] = (difference / np.maximum(np.abs(exact).max(axis=1), smallest)).tolist()
    return found
