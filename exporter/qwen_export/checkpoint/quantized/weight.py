"""A weight that a checkpoint stores quantised, whatever the format.

Shape letters: K inputs (the reduced dimension), N outputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen_export.checkpoint.quantized.parts import Part
from qwen_export.checkpoint.tensors import TensorInfo
from qwen_export.errors import CheckpointError

if TYPE_CHECKING:
    from qwen_export.quantization.tensor import QuantizedTensor

__all__ = [
    "FloatArray",
    "IntArray",
    "IntegerWeight",
    "QuantizedWeight",
    "ShortArray",
    "finite_scales",
    "unpack_words",
]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.integer]
ShortArray = npt.NDArray[np.int16]

SLICE_VALUES = 1 << 21
"""Weights converted at a time: bounds the memory beside the result to tens of MB."""
WORD_BITS = 32
EXACT_BITS = 8
"""The widest codes of a bundle."""
_TOGETHER = 8
"""Outputs in a word of the narrowest codes."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight(ABC):
    """One linear layer's weight or one table, with the tensors that store it."""

    name: str
    """The plain weight's name, such as model.layers.0.mlp.up_proj.weight."""
    shape: tuple[int, int]
    """Of the plain weight, (N, K)."""
    parts: tuple[Part, ...]
    """What stores it, the codes first."""

    @property
    @abstractmethod
    def exact_bits(self) -> int | None:
        """4 or 8: signed symmetric codes of so many bits hold it exactly; None: not known to.

        What headers and zero points say; codes are not read.
        """

    def find_exact_bits(self, *, read: bool = True) -> int | None:
        """`exact_bits`, from the codes where nothing else tells; None: no such codes hold it.

        Args:
            read: Whether codes may be read; without it those that alone tell are taken to fit.
        """
        return self.exact_bits

    @abstractmethod
    def rows(self, which: slice | IntArray) -> FloatArray:
        """Some outputs of the plain weight, without unpacking the others.

        Args:
            which: A slice of the N outputs without a step, or their numbers, [n].

        Returns:
            [n, K]: stored integer (less its zero point) times scale in fp32.

        Raises:
            CheckpointError: If a scale is not finite.
        """

    def dequantize(self) -> FloatArray:
        """The plain weight, [N, K]; see `rows`."""
        return self.rows(slice(None))

    @abstractmethod
    def quantized(self) -> QuantizedTensor | None:
        """The same numbers as symmetric codes [K, N], or None where they do not fit 8 bits.

        Raises:
            CheckpointError: If a scale is not finite, or codes have more bits than configured.
        """

    @property
    def info(self) -> TensorInfo:
        """The plain weight's description; its bytes are those of all parts."""
        codes = self.parts[0].info
        num_bytes = sum(part.info.num_bytes for part in self.parts)
        return TensorInfo("float32", self.shape, codes.file, codes.offset, num_bytes)

    def is_stored_like(self, other: QuantizedWeight) -> bool:
        """Whether another weight has the same format and the same bytes in every part."""
        return replace(self, name="", parts=()) == replace(other, name="", parts=()) and all(
            mine.equals(theirs) for mine, theirs in zip(self.parts, other.parts, strict=True)
        )

    def release(self) -> None:
        """Drop its parts' pages from memory."""
        for part in self.parts:
            part.release()


@dataclass(frozen=True, slots=True)
class IntegerWeight(QuantizedWeight):
    """Integer codes with one scale, and maybe one zero point, per group of inputs."""

    bits: int
    """4 or 8, of a stored code."""
    group_size: int
    """Inputs that share a scale; divides K."""
    symmetric: bool
    """Whether every zero point is the middle of the codes' range."""

    @abstractmethod
    def codes(self, outputs: slice) -> IntArray:
        """Codes of some outputs as stored, [K, n]; the slice starts at a multiple of 8."""

    @abstractmethod
    def zero_points(self) -> ShortArray:
        """The codes that stand for 0, [G, N], or [1, 1] for one of all."""

    @abstractmethod
    def scales(self) -> FloatArray:
        """[G, N]."""

    @property
    def exact_bits(self) -> int | None:
        """A symmetric code's own bits; 8 for 4-bit codes less their zero points (-15 to 15)."""
        if self.symmetric:
            return self.bits
        return 8 if self.bits == 4 else None

    def find_exact_bits(self, *, read: bool = True) -> int | None:
        """`exact_bits`; of 8-bit codes with zero points 8 where all differences fit."""
        if self.exact_bits is not None:
            return self.exact_bits
        if not read:
            return EXACT_BITS
        zeros = self.zero_points()
        limit = 1 << (EXACT_BITS - 1)
        fits = all(
            centred.min() >= -limit and centred.max() < limit
            for centred in (self._centred(outputs, zeros) for outputs in self._slices())
        )
        self.release()
        return EXACT_BITS if fits else None

    def rows(self, which: slice | IntArray) -> FloatArray:
        """Some outputs of the plain weight, [n, K]: (code - zero point) times scale in fp32."""
        num_outputs, num_inputs = self.shape
        wanted = np.arange(num_outputs)[which]
        scales, zeros = finite_scales(self.scales(), self.parts), self.zero_points()
        weight = np.empty((len(wanted), num_inputs), np.float32)
        for outputs in self._slices(wanted):
            centred = self._centred(outputs, zeros)
            values = centred.astype(np.float32).reshape(len(scales), self.group_size, -1)
            values *= scales[:, None, outputs]
            some = values.reshape(num_inputs, -1).T
            if isinstance(which, slice):
                here = slice(*np.searchsorted(wanted, (outputs.start, outputs.stop)))
                start = int(wanted[here.start]) - outputs.start
                weight[here] = some[start : start + here.stop - here.start]
            else:
                places = np.flatnonzero((wanted >= outputs.start) & (wanted < outputs.stop))
                weight[places] = some[wanted[places] - outputs.start]
        return weight

    def quantized(self) -> QuantizedTensor | None:
        """The same numbers as symmetric codes [K, N], or None where they do not fit 8 bits."""
        # Imported here, because the package of the quantisers reads checkpoints.
        from qwen_export.quantization.tensor import QuantizedTensor, code_range

        num_outputs, num_inputs = self.shape
        scales, zeros = finite_scales(self.scales(), self.parts), self.zero_points()
        bits = self.exact_bits or EXACT_BITS
        lowest, highest = code_range(bits)
        codes = np.empty((num_inputs, num_outputs), np.int8)
        for outputs in self._slices():
            centred = self._centred(outputs, zeros)
            if centred.min() < lowest or centred.max() > highest:
                if self.exact_bits is None:
                    return None
                part = self.parts[0]
                raise CheckpointError(
                    f"{part.name} in {part.info.file.name} must hold codes of {self.bits} bits, as "
                    "quantization_config says, but holds larger ones; one of the two files is "
                    "wrong",
                    path=part.info.file,
                )
            codes[:, outputs] = centred
        return QuantizedTensor(codes, scales, bits, self.group_size)

    def _centred(self, outputs: slice, zeros: ShortArray) -> ShortArray:
        """Codes less their zero points, [K, n]."""
        codes = self.codes(outputs).astype(np.int16, order="C")
        if zeros.shape != (1, 1):
            zeros = zeros[:, outputs]
        groups = codes.reshape(len(zeros), -1, codes.shape[1])  # a view
        groups -= zeros[:, None]
        return codes

    def _slices(self, wanted: IntArray | None = None) -> Iterator[slice]:
        """Slices of a bounded size that hold all outputs, or those that are wanted."""
        num_outputs, num_inputs = self.shape
        # Words hold up to 8 outputs, which stay together.
        step = max(1, SLICE_VALUES // (_TOGETHER * num_inputs)) * _TOGETHER
        if wanted is None or len(wanted) == num_outputs:
            starts = range(0, num_outputs, step)
            yield from (slice(start, min(start + step, num_outputs)) for start in starts)
            return
        runs = np.unique(wanted // _TOGETHER)
        first = 0
        for last in range(len(runs)):
            full = (last + 1 - first) * _TOGETHER >= step
            if last + 1 == len(runs) or runs[last + 1] != runs[last] + 1 or full:
                stop = (int(runs[last]) + 1) * _TOGETHER
                yield slice(int(runs[first]) * _TOGETHER, min(stop, num_outputs))
                first = last + 1


def unpack_words(
    words: npt.NDArray[np.int32], bits: int, order: tuple[int, ...] | None = None
) -> npt.NDArray[np.uint8]:
    """Take codes out of 32-bit words, the lowest bits first.

    Args:
        words: [..., W].
        bits: 4 or 8.
        order: Where in its word's run of codes each field belongs; None for as it comes.

    Returns:
        [..., W * 32 / bits], from 0.
    """
    fields = WORD_BITS // bits
    unsigned = words.view(np.uint32)
    codes = np.empty((*words.shape, fields), np.uint8)
    for i, place in enumerate(order or range(fields)):
        codes[..., place] = (unsigned >> np.uint32(bits * i)) & np.uint32((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], math.prod(codes.shape[-2:]))


def finite_scales(scales: FloatArray, parts: tuple[Part, ...]) -> FloatArray:
    """Refuse a weight one of whose scales is NaN or infinite.

    Args:
        scales: Its scales, any shape.
        parts: Its parts, the second being the scales, for the message.

    Returns:
        The scales.

    Raises:
        CheckpointError: If a scale is not finite.
    """
    if not np.isfinite(scales).all():
        info = parts[1].info
        raise CheckpointError(
            f"{parts[1].name} in {info.file.name} must hold finite scales, but one is not; the "
            "checkpoint is damaged",
            path=info.file,
        )
    return scales
