"""What to quantise to, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwen_export.errors import ExportError

__all__ = [
    "BITS",
    "BLOCK_SIZES",
    "KERNEL_BLOCK_SIZES",
    "METHODS",
    "Method",
    "QuantizationOptions",
]

Method = Literal["rtn", "search", "gptq"]
METHODS: tuple[Method, ...] = get_args(Method)
BITS = (4, 8)
KERNEL_BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Inputs that may share a scale where ONNX Runtime fuses a weight with its MatMul."""
BLOCK_SIZES = KERNEL_BLOCK_SIZES[1:-1]
"""Those that are offered: what TensorRT's int4 kernels take, too."""


@dataclass(frozen=True, slots=True)
class QuantizationOptions:
    """The format of a quantised weight and the method that chooses its codes and scales.

    Raises:
        ExportError: If a value is not one of those that exist. It names the option.
    """

    bits: int
    """4 or 8."""
    block_size: int
    """Inputs that share a scale: 32, 64 or 128."""
    method: Method
    """``rtn`` rounds to nearest; ``search`` fits the scale of every block to its weights;
    ``gptq`` carries each rounding error over to the inputs that follow, weighed by a calibration
    text."""
    or_smaller: bool = False
    """Whether a weight whose inputs ``block_size`` does not divide takes the next smaller size
    that does; else it is refused."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bits", self.bits, BITS),
            ("block_size", self.block_size, BLOCK_SIZES),
            ("method", self.method, METHODS),
        ):
            # type() because True == 1 and 4.0 == 4.
            if type(value) not in (int, str) or value not in known:
                raise ExportError(
                    f"{name} must be one of {', '.join(map(str, known))}, got {value!r}"
                )

    def block_size_of(self, name: str, inputs: int) -> int:
        """The block size of a weight.

        Args:
            name: The weight, for the message.
            inputs: Its number of inputs, K.

        Returns:
            One that divides K.

        Raises:
            ExportError: If there is none. It names the weight and what would do.
        """
        if inputs % self.block_size == 0:
            return self.block_size
        fitting = [size for size in BLOCK_SIZES if inputs % size == 0]
        smaller = [size for size in fitting if size < self.block_size]
        if self.or_smaller and smaller:
            return max(smaller)
        keep = f"--keep {name} stores it in fp32"
        if fitting:
            listed = " or ".join(map(str, fitting))
            raise ExportError(
                f"{name}: a block size of {self.block_size} must divide its {inputs} inputs; "
                f"choose a block size of {listed}, or {keep}"
            )
        listed = ", ".join(map(str, BLOCK_SIZES))
        raise ExportError(
            f"{name}: a block size must divide its {inputs} inputs, but none of {listed} does; "
            f"{keep}"
        )
