"""FP8 checkpoints: e4m3 weights [N, K] with a scale per tensor, per output or per block.

The layout serves quant_method "fp8" (weight_scale_inv, multiplied despite its name) and the float
formats of compressed-tensors (weight_scale).

Source:
    transformers ``FP8Linear`` and ``Fp8Dequantize`` (integrations/finegrained_fp8.py), which
    multiply in fp32; vLLM ``Fp8Config`` for per-tensor scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.checkpoint.quantized.method import Exceptions, block_of, module_of, refused
from qwen_export.checkpoint.quantized.parts import StoredTensors
from qwen_export.checkpoint.quantized.weight import (
    SLICE_VALUES,
    FloatArray,
    IntArray,
    QuantizedWeight,
    finite_scales,
)

__all__ = ["FLOAT8", "Float8Weight", "Fp8Method", "scale_grids"]

FLOAT8 = "float8_e4m3fn"
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""Every e4m3 number by its byte; 0x7F and 0xFF are NaN."""
_DEFAULT_BLOCK = (128, 128)  # of transformers' FineGrainedFP8Config
_SCALE_NAMES = ("weight_scale_inv", "weight_scale")
_BOOKKEEPING = (
    "dequantize",
    "expert_dtype",
    "is_checkpoint_fp8_serialized",
    "modules_to_convert",
    "quant_method",
    "scale_fmt",
)


@dataclass(frozen=True, slots=True)
class Float8Weight(QuantizedWeight):
    """An e4m3 weight; parts are the weight and its scales."""

    block: tuple[int, int]
    """Outputs and inputs that share a scale; blocks at the edges may be cut."""

    @property
    def exact_bits(self) -> int | None:
        """None: the steps between floats grow, those of integers do not."""
        return None

    def rows(self, which: slice | IntArray) -> FloatArray:
        """Some outputs of the plain weight, [n, K]: e4m3 value times scale in fp32."""
        rows, columns = self.block
        num_outputs, num_inputs = self.shape
        grid = (-(-num_outputs // rows), -(-num_inputs // columns))
        stored = self.parts[1].read().astype(np.float32).reshape(grid)
        scales = finite_scales(stored, self.parts)
        codes = self.parts[0].read().view(np.uint8)
        wanted = np.arange(num_outputs)[which]
        weight = np.empty((len(wanted), num_inputs), np.float32)
        step = max(1, SLICE_VALUES // num_inputs)
        for start in range(0, len(wanted), step):
            some = wanted[start : start + step]
            block = weight[start : start + step]
            np.take(_VALUES, codes[some], out=block)
            block *= np.repeat(scales[some // rows], columns, axis=1)[:, :num_inputs]
        return weight

    def quantized(self) -> None:
        """None: floats are no multiples of a scale."""


@dataclass(frozen=True, slots=True)
class Fp8Method:
    """quant_method "fp8"."""

    block: tuple[int, int] | None
    """weight_block_size; None where scales are per tensor or per output."""
    exceptions: Exceptions
    warnings: tuple[str, ...]

    KEYS = (
        "activation_scheme",
        "fmt",
        "weight_block_size",
        "modules_to_not_convert",
        "ignored_layers",
        *_BOOKKEEPING,
    )
    """The keys of quantization_config that are known."""

    @classmethod
    def read(cls, values: ConfigValues) -> Fp8Method:
        """Read quantization_config.

        Raises:
            UnsupportedModelError: If it asks for another type than e4m3.
            CheckpointError: If a value has the wrong type.
        """
        number_format = values.text("fmt", "e4m3")
        if number_format not in ("e4m3", FLOAT8):
            raise refused(values, "fmt", number_format, ["'e4m3'"])
        scheme = values.text("activation_scheme", "dynamic")
        if scheme.lower() not in ("dynamic", "static"):
            raise refused(values, "activation_scheme", scheme, ["'dynamic'", "'static'"])
        return cls(
            block=_block_size(values),
            exceptions=Exceptions.read(values, "modules_to_not_convert", "ignored_layers"),
            warnings=(f"activation_scheme {scheme!r}",),
        )

    def weight(
        self, name: str, shape: tuple[int, int], stored: StoredTensors
    ) -> Float8Weight | None:
        """Find how a weight is stored; see `Method.weight`."""
        part = stored.find(name)
        if part is None or part.info.dtype != FLOAT8:
            return None
        # With a block size the scales must be of its grid; without, the grid tells the block.
        blocks = [self.block] if self.block else [shape, (1, shape[1]), _DEFAULT_BLOCK]
        grids = scale_grids(shape, blocks)
        module = module_of(name)
        found = [key for key in _SCALE_NAMES if stored.find(f"{module}.{key}") is not None]
        meanings = {
            grid: f"(one for each {block[0]}x{block[1]} block)" for grid, block in grids.items()
        }
        scales = stored.require_scales(f"{module}.{(found or _SCALE_NAMES)[0]}", meanings)
        codes = stored.require(name, (FLOAT8,), {shape: "(outputs, inputs)"})
        weight = Float8Weight(name, shape, (codes, scales), grids[scales.info.shape])
        self.exceptions.check(weight)
        return weight


def scale_grids(
    shape: tuple[int, int], blocks: list[tuple[int, int]]
) -> dict[tuple[int, ...], tuple[int, int]]:
    """The shapes that scales may be stored in, each with the block that it means.

    Args:
        shape: Of the weight, (N, K).
        blocks: Blocks of outputs and inputs to allow, the likelier first.

    Returns:
        Block by shape. One scale may be stored as a scalar or as [1], one a row as [N] too.
    """
    grids: dict[tuple[int, ...], tuple[int, int]] = {}
    for block in blocks:
        grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        spellings: list[tuple[int, ...]] = [grid]
        if grid[1] == 1:
            spellings.append(grid[:1])
        if grid == (1, 1):
            spellings.append(())
        for spelling in spellings:
            grids.setdefault(spelling, block)
    return grids


def _block_size(values: ConfigValues) -> tuple[int, int] | None:
    if values.raw.get("weight_block_size") is None:
        return None
    return block_of(values, "weight_block_size", ", or null")
