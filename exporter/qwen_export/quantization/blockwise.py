"""Methods that treat every block of a weight alone: round-to-nearest and scale search.

Shape letters: K inputs (the reduced dimension), N outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from qwen_export.quantization.scales import covering_scales, encode, fit_scales
from qwen_export.quantization.tensor import QuantizedTensor

__all__ = ["round_to_nearest", "search"]

Floats = npt.NDArray[np.float32]

_TILE_BYTES = 128 << 10
"""Of weights worked on at a time: they and their codes fit a core's cache."""


def round_to_nearest(weight: Floats, bits: int, block_size: int) -> QuantizedTensor:
    """Quantise with scales that clip nothing.

    Args:
        weight: [K, N], finite; K a multiple of ``block_size``. Not modified.
        bits: 4 or 8.
        block_size: Inputs that share a scale.

    Returns:
        Codes and scales; no weight is off by more than half its block's scale.
    """
    return _by_block(weight, bits, block_size, covering_scales)


def search(weight: Floats, bits: int, block_size: int) -> QuantizedTensor:
    """Quantise with the scales that leave the least squared error of each block.

    Args:
        weight: [K, N], finite; K a multiple of ``block_size``. Not modified.
        bits: 4 or 8.
        block_size: Inputs that share a scale.

    Returns:
        Codes and scales.
    """
    return _by_block(weight, bits, block_size, fit_scales)


def _by_block(
    weight: Floats, bits: int, block_size: int, scales_of: Callable[[Floats, int], Floats]
) -> QuantizedTensor:
    inputs, outputs = weight.shape
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty((inputs // block_size, outputs), np.float32)
    columns = max(64, _TILE_BYTES // (4 * block_size))
    for index, first in enumerate(range(0, inputs, block_size)):
        rows = slice(first, first + block_size)
        for left in range(0, outputs, columns):
            tile = slice(left, left + columns)
            block = np.ascontiguousarray(weight[rows, tile])
            scales[index, tile] = scales_of(block, bits)
            codes[rows, tile] = encode(block, scales[index, tile], bits)
    return QuantizedTensor(codes, scales, bits, block_size)
