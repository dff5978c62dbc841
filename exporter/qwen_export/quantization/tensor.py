"""A quantised weight, the way the graphs take it.

Shape letters: K inputs (the reduced dimension), N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["QuantizedTensor", "code_range"]


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Signed codes and one scale per block of ``block_size`` inputs of every output.

    The weight is ``codes * scales``, each scale standing for its block's rows: symmetric, without
    zero points. It is what ONNX's DequantizeLinear takes with ``axis=0`` and this block size.
    """

    codes: npt.NDArray[np.int8]
    """[K, N], within `code_range`; int4 codes are kept one a byte until they are stored."""
    scales: npt.NDArray[np.float32]
    """[K / block_size, N], finite."""
    bits: int
    """4 or 8: the type the codes are stored as."""
    block_size: int
    """Inputs that share a scale; divides K."""

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weight it stands for, [K, N]."""
        blocks = self.codes.reshape(len(self.scales), self.block_size, -1).astype(np.float32)
        blocks *= self.scales[:, None]
        return blocks.reshape(self.codes.shape)


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest code of a signed type of 4 or 8 bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
