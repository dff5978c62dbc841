"""The one weights file: every tensor once, streamed from the checkpoint, hashed as it is written.

Both graphs point into it. A tensor keeps its checkpoint name; a linear layer's weight is stored
[in, out], the way MatMul takes it. A quantised weight is two tensors: its codes under the
checkpoint's name, and their scales.

Shape letters: K inputs (the dimension whose blocks share a scale), N outputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qwen_export.quantization.tensor import QuantizedTensor

__all__ = [
    "BlockFormat",
    "QuantizedSource",
    "Source",
    "StoredTensor",
    "TensorSource",
    "WeightsFile",
    "bind_weights",
    "codes_of_bytes",
    "scale_name",
    "to_float32",
    "write_weights",
]

Array = npt.NDArray[np.generic]
Check = Callable[[str, npt.NDArray[np.float32]], None]

ALIGNMENT = 64
"""Bytes; a cache line, and what vector loads want."""
PAGE = 4096
"""Bytes; tensors of `PAGE_ALIGN_FROM` bytes and more start on a page, so that they can be mapped."""
PAGE_ALIGN_FROM = 1 << 20
BLOCK_BYTES = 64 << 20
"""Bytes converted at a time. A transposed tensor is read in at most `MAX_PASSES` passes."""
MAX_PASSES = 8


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How a quantised weight is stored."""

    bits: int
    """4 (two codes a byte, the first in the low half) or 8."""
    block_size: int
    """Inputs that share a scale; divides K."""
    axis: int
    """Of the inputs: 0 for a weight stored [K, N], 1 for one stored [N, K]."""

    @property
    def name(self) -> Literal["int4", "int8"]:
        """The name users know."""
        return "int4" if self.bits == 4 else "int8"

    @property
    def dtype(self) -> ir.DataType:
        """ONNX's type of the codes."""
        return ir.DataType.INT4 if self.bits == 4 else ir.DataType.INT8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the weights file."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int
    dtype: ir.DataType = ir.DataType.FLOAT
    format: BlockFormat | None = None
    """Of codes: what their scales, the tensor named `scale_name`, stand for. None for floats."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """What was written."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where a tensor of floats comes from."""

    name: str
    """Name in the graphs and in the weights file."""
    shape: tuple[int, ...]
    """Shape as stored."""
    read: Callable[[], Array]
    """The tensor as the checkpoint has it (a memory-mapped view), any float type."""
    transposed: bool = False
    """Whether the stored tensor is the transpose of what `read` returns (2-D)."""
    done: Callable[[], None] | None = None
    """Called when the tensor has been written; releases its pages."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored tensor."""
        return 4 * math.prod(self.shape)

    def contents(self, check: Check) -> Iterator[_Content]:
        """The tensor, block by block."""
        yield _Content(self.name, self.shape, ir.DataType.FLOAT, self._blocks(check))

    def _blocks(self, check: Check) -> Iterator[Array]:
        """The stored tensor as consecutive fp32 blocks of its rows, [rows, ...]."""
        array = self.read()
        if self.transposed:
            array = array.T
        if array.shape != self.shape:
            raise AssertionError(f"{self.name}: read {array.shape}, layout says {self.shape}")
        row_bytes = 4 * math.prod(array.shape[1:])
        rows = max(1, BLOCK_BYTES // row_bytes)
        if self.transposed:
            rows = max(rows, math.ceil(array.shape[0] / MAX_PASSES))
        for start in range(0, array.shape[0], rows):
            block = to_float32(array[start : start + rows])
            check(self.name, block)
            yield block


@dataclass(frozen=True, slots=True)
class QuantizedSource:
    """Where a quantised weight comes from."""

    name: str
    """Name of its codes; `scale_name` gives that of its scales."""
    shape: tuple[int, int]
    """K and N, whichever way they are stored."""
    format: BlockFormat
    parts: Callable[[Check], Iterator[QuantizedTensor]]
    """Consecutive slices of the outputs, [K, n] each, in the order of the outputs."""
    method: Literal["rtn", "search", "gptq", "imported"]
    """What chooses codes and scales; "imported" are those of the checkpoint."""
    done: Callable[[], None] | None = None
    """Called when codes and scales have been written."""

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and scales."""
        inputs, outputs = self.shape
        codes = (inputs * outputs * self.format.bits + 7) // 8
        return codes + 4 * (inputs // self.format.block_size) * outputs

    def contents(self, check: Check) -> Iterator[_Content]:
        """Codes, then scales.

        The codes of the whole weight are held while slices of it are quantised: a slice of the
        outputs lies scattered over the file.
        """
        codes, scales = self._collect(check)
        if self.format.axis == 1:
            codes, scales = codes.T, scales.T
        yield _Content(self.name, codes.shape, self.format.dtype, self._stored(codes), self.format)
        yield _Content(
            scale_name(self.name),
            scales.shape,
            ir.DataType.FLOAT,
            iter([np.ascontiguousarray(scales)]),
        )

    def _collect(self, check: Check) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        inputs, outputs = self.shape
        blocks = inputs // self.format.block_size
        # Slices of the outputs are rows here where they are rows in the file.
        by_rows = self.format.axis == 1
        codes = np.empty((outputs, inputs) if by_rows else (inputs, outputs), np.int8)
        scales = np.empty((outputs, blocks) if by_rows else (blocks, outputs), np.float32)
        if by_rows:
            codes, scales = codes.T, scales.T
        start = 0
        for part in self.parts(check):
            stop = start + part.codes.shape[1]
            if (part.bits, part.block_size) != (self.format.bits, self.format.block_size):
                raise AssertionError(f"{self.name}: got {part.bits} bits in {part.block_size}")
            codes[:, start:stop], scales[:, start:stop] = part.codes, part.scales
            start = stop
        if start != outputs:
            raise AssertionError(f"{self.name}: got {start} outputs, layout says {outputs}")
        return codes, scales

    def _stored(self, codes: npt.NDArray[np.int8]) -> Iterator[Array]:
        flat = np.ascontiguousarray(codes).reshape(-1)
        for start in range(0, flat.size, BLOCK_BYTES):
            block = flat[start : start + BLOCK_BYTES]
            yield _pack_int4(block) if self.format.bits == 4 else block


Source = TensorSource | QuantizedSource


@dataclass(frozen=True, slots=True)
class _Content:
    """One tensor on its way into the file."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    blocks: Iterator[Array]
    """Its bytes in order, in contiguous arrays."""
    format: BlockFormat | None = None

    @property
    def num_bytes(self) -> int:
        return (math.prod(self.shape) * self.dtype.bitwidth + 7) // 8


def scale_name(name: str) -> str:
    """The tensor that holds the scales of a quantised weight."""
    return f"{name}_scale"


def write_weights(
    path: Path,
    sources: Sequence[Source],
    *,
    check: Check,
    progress: Callable[[int], None] = lambda _: None,
) -> WeightsFile:
    """Stream tensors into one file.

    Args:
        path: The file to create.
        sources: The tensors, in the order they are stored.
        check: Called with every block of a checkpoint's values as (tensor name, values), as they
            were before quantisation; raises to refuse it.
        progress: Called with the number of bytes written since the last call.

    Returns:
        Offsets, size and sha256 of the file.

    Raises:
        OSError: If the file cannot be written (a full disk).
    """
    digest = hashlib.sha256()
    stored: dict[str, StoredTensor] = {}
    position = 0
    with path.open("xb") as file:
        for source in sources:
            for content in source.contents(check):
                num_bytes = content.num_bytes
                padding = -position % (PAGE if num_bytes >= PAGE_ALIGN_FROM else ALIGNMENT)
                digest.update(bytes(padding))
                file.write(bytes(padding))
                position += padding
                for block in content.blocks:
                    data = block.data.cast("B")
                    digest.update(data)
                    file.write(data)
                    progress(len(data))
                stored[content.name] = StoredTensor(
                    content.name,
                    content.shape,
                    position,
                    num_bytes,
                    content.dtype,
                    content.format,
                )
                position += num_bytes
            if source.done is not None:
                source.done()
    return WeightsFile(path, stored, position, digest.hexdigest())


def to_float32(array: Array) -> npt.NDArray[np.float32]:
    """A contiguous fp32 copy of an array of any float type."""
    out = np.empty(array.shape, np.float32)
    if array.dtype == ml_dtypes.bfloat16:
        # bf16 is the upper half of an fp32; NumPy's integer loops are far faster than a cast.
        bits = out.view(np.uint32)
        bits[...] = array.view(np.uint16)
        bits <<= 16
    else:
        out[...] = array
    return out


def _pack_int4(codes: npt.NDArray[np.int8]) -> Array:
    """Two codes a byte, the first in the low half, as ONNX stores INT4; [n] to [ceil(n / 2)]."""
    halves = codes.view(np.uint8) & np.uint8(0x0F)
    if halves.size % 2:
        halves = np.append(halves, np.uint8(0))
    return halves[0::2] | (halves[1::2] << np.uint8(4))


def codes_of_bytes(tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    """Bytes that a graph looks up, two codes in each, as INT4; another tensor as it is.

    Args:
        tensor: UINT8 [E, V / 2] for codes [E, V].
    """
    if tensor.dtype != ir.DataType.UINT8:
        return tensor
    rows, num_bytes = tensor.shape.numpy()
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        ir.DataType.INT4,
        shape=ir.Shape([rows, 2 * num_bytes]),
        name=tensor.name,
        base_dir=tensor.base_dir,
    )


def bind_weights(
    model: ir.Model, weights: WeightsFile, aliases: Mapping[str, str] | None = None
) -> None:
    """Point a graph's weight initializers into the weights file; drop none, invent none.

    Args:
        model: The graph; changed in place.
        weights: The file.
        aliases: Initializers that name the bytes of another tensor, where the file has none of
            their own.
    """
    aliases = aliases or {}
    for name, value in model.graph.initializers.items():
        if name.startswith("constant."):
            continue
        tensor = weights.tensors[name if name in weights.tensors else aliases[name]]
        if (value.dtype, tensor.dtype) == (ir.DataType.UINT8, ir.DataType.INT4):
            # Looked up as bytes, two codes in each.
            *rows, codes = tensor.shape
            tensor = replace(tensor, shape=(*rows, codes // 2), dtype=ir.DataType.UINT8)
        if value.shape is None or tuple(value.shape) != tensor.shape:
            raise AssertionError(f"{name}: the graph wants {value.shape}, the file has {tensor}")
        if value.dtype != tensor.dtype:
            raise AssertionError(f"{name}: the graph wants {value.dtype}, the file has {tensor}")
        value.const_value = ir.ExternalTensor(
            location=weights.path.name,
            offset=tensor.offset,
            length=tensor.num_bytes,
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=weights.path.parent,
        )
