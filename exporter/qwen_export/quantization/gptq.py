"""GPTQ: every rounding error is carried over to the inputs that are still to be rounded.

Shape letters: K inputs (the reduced dimension), N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_export.quantization.scales import encode, fit_scales
from qwen_export.quantization.tensor import QuantizedTensor

__all__ = ["DAMPING", "ErrorFeedback", "error_feedback", "gptq"]

Floats = npt.NDArray[np.float32]

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it, as in the paper."""


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """How the error of an input's weight is made good by the inputs after it."""

    matrix: Floats
    """[K, K], strictly upper triangular: row j says how much of the error of input j is added to
    the weight of every later input."""
    importance: Floats
    """[K], positive: what a squared error that is left over costs, by input."""


def error_feedback(hessian: npt.NDArray[np.floating]) -> ErrorFeedback:
    """Factorise the Hessian of a linear layer's inputs.

    With H = U D U^T, U unit upper triangular, the output error of a column w quantised to q is
    the sum over k of D_k (e_k + sum over j < k of U_jk e_j)^2, where e = w - q. Choosing q in
    order, each term is made small by rounding w_k plus the errors before it times U's column k.

    Args:
        hessian: X^T X of inputs X [samples, K] up to a factor, [K, K]. Not modified.

    Returns:
        U without its diagonal, and D. An input that was never seen counts as little as damping
        makes it.

    Source:
        GPTQ, arXiv:2210.17323; in this form, which needs no inverse, as LDLQ in QuIP,
        arXiv:2307.13304, which proves the two equal.
    """
    # Double precision: inputs of language models are nearly dependent.
    flipped = np.array(hessian[::-1, ::-1], np.float64)
    damping = max(DAMPING * float(flipped.diagonal().mean()), float(np.finfo(np.float32).tiny))
    flipped[np.diag_indices_from(flipped)] += damping
    factor = np.linalg.cholesky(flipped)[::-1, ::-1]  # upper triangular, H = factor factor^T
    del flipped
    diagonal = factor.diagonal().copy()
    matrix = np.empty(factor.shape, np.float32)
    np.divide(factor, diagonal, out=matrix, casting="same_kind")
    np.fill_diagonal(matrix, 0)
    importance = (diagonal / diagonal.max()) ** 2
    return ErrorFeedback(matrix, np.maximum(importance, 1e-12).astype(np.float32))


def gptq(weight: Floats, feedback: ErrorFeedback, bits: int, block_size: int) -> QuantizedTensor:
    """Quantise so that the layer's outputs, rather than its weights, change least.

    Args:
        weight: [K, N], finite; K a multiple of ``block_size``. Not modified. Outputs do not
            depend on each other, so any slice of them can be given.
        feedback: Of the layer's inputs.
        bits: 4 or 8.
        block_size: Inputs that share a scale, fitted when the errors of all blocks before it are
            known.

    Returns:
        Codes and scales.
    """
    inputs, outputs = weight.shape
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty((inputs // block_size, outputs), np.float32)
    errors = np.empty_like(weight)
    for index, first in enumerate(range(0, inputs, block_size)):
        rows = slice(first, first + block_size)
        block = weight[rows] + feedback.matrix[:first, rows].T @ errors[:first]
        scale = fit_scales(block, bits, feedback.importance[rows])
        scales[index] = scale
        for row in range(block_size):
            k = first + row
            code = encode(block[row], scale, bits)
            codes[k] = code
            errors[k] = weight[k] - code * scale
            block[row + 1 :] += feedback.matrix[k, k + 1 : rows.stop, None] * errors[k]
    return QuantizedTensor(codes, scales, bits, block_size)
