"""One interface over the methods: a weight's columns in, codes and scales out.

Shape letters: K inputs (the reduced dimension), N outputs, n outputs of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from qwen_export.errors import ExportError
from qwen_export.quantization.blockwise import round_to_nearest, search
from qwen_export.quantization.options import QuantizationOptions
from qwen_export.quantization.tensor import QuantizedTensor

if TYPE_CHECKING:
    # Checkpoints that are stored quantised are read with this package's tensors.
    from qwen_export.checkpoint import Checkpoint

__all__ = [
    "BlockwiseQuantizer",
    "Quantizer",
    "check_finite",
    "columns_at_a_time",
    "make_quantizer",
]

Floats = npt.NDArray[np.float32]

_SLICE_BYTES = 64 << 20


class Quantizer(Protocol):
    """Quantises the weights of one model, any number of outputs at a time."""

    def __call__(self, weight: Floats, *, name: str, start: int = 0) -> QuantizedTensor:
        """Quantise some of a weight's outputs.

        Args:
            weight: [K, n] of the weight's [K, N]. Not modified.
            name: The weight's name in the checkpoint. A calibrated quantizer takes the weights
                layer after layer, in any order within a layer.
            start: Which of the N outputs comes first.

        Returns:
            Codes [K, n] and scales [K / block_size, n]; scales are positive and normal fp32.

        Raises:
            ExportError: If no block size divides K, or a weight is not finite. It names the
                weight.
        """
        ...


@dataclass(frozen=True, slots=True)
class BlockwiseQuantizer:
    """A `Quantizer` by ``rtn`` or ``search``: no calibration, any order, nothing remembered."""

    options: QuantizationOptions

    def __post_init__(self) -> None:
        if self.options.method == "gptq":
            raise ExportError("method gptq needs a calibration text; rtn and search need none")

    def __call__(self, weight: Floats, *, name: str, start: int = 0) -> QuantizedTensor:
        """Quantise some of a weight's outputs; see `Quantizer`."""
        options = self.options
        block_size = options.block_size_of(name, len(weight))
        check_finite(name, weight)
        method = search if options.method == "search" else round_to_nearest
        return method(weight, options.bits, block_size)


def check_finite(name: str, weight: Floats) -> None:
    """Refuse NaN and infinity; a sum over them is not finite either.

    Raises:
        ExportError: It names the weight.
    """
    # Extremes, not sums: sums of finite weights may overflow.
    if weight.size and not (np.isfinite(weight.max()) and np.isfinite(weight.min())):
        raise ExportError(f"{name} must hold finite numbers only; the checkpoint is damaged")


def columns_at_a_time(inputs: int) -> int:
    """How many outputs to quantise at a time, so that a slice in fp32 takes about 64 MB.

    Args:
        inputs: K of the weight.
    """
    return max(64, _SLICE_BYTES // (4 * inputs))


def make_quantizer(
    options: QuantizationOptions,
    *,
    checkpoint: Checkpoint | None = None,
    calibration: Path | None = None,
) -> Quantizer:
    """Make the quantizer of a method.

    Args:
        options: The format and the method.
        checkpoint: The model whose weights are to be quantised. Only gptq uses it.
        calibration: A text file in UTF-8 like what the model will read and write. Only for gptq.

    Returns:
        The quantizer. One for gptq takes the linear weights of the decoder's layers only, layer
        after layer.

    Raises:
        ExportError: If gptq lacks a checkpoint or a text, or another method is given a text.
    """
    if options.method != "gptq":
        if calibration is not None:
            raise ExportError(
                f"a calibration text is for method gptq only, got {calibration} for "
                f"{options.method}; leave it out"
            )
        return BlockwiseQuantizer(options)
    if checkpoint is None or calibration is None:
        raise ExportError("method gptq needs a calibration text; rtn and search need none")
    # Here, because it imports torch, which the other methods do without.
    from qwen_export.quantization.calibration import CalibratedQuantizer, read_calibration

    return CalibratedQuantizer(checkpoint, options, read_calibration(checkpoint, calibration))
