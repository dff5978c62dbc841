"""The one weights file: every tensor once, streamed from the checkpoint, hashed as it is written.

Both graphs point into it. A tensor keeps its checkpoint name; a linear layer's weight is stored
[in, out], the way MatMul takes it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["StoredTensor", "TensorSource", "WeightsFile", "bind_weights", "write_weights"]

Array = npt.NDArray[np.generic]

ALIGNMENT = 64
"""Bytes; a cache line, and what vector loads want."""
PAGE = 4096
"""Bytes; tensors of `PAGE_ALIGN_FROM` bytes and more start on a page, so that they can be mapped."""
PAGE_ALIGN_FROM = 1 << 20
BLOCK_BYTES = 64 << 20
"""Bytes converted at a time. A transposed tensor is read in at most `MAX_PASSES` passes."""
MAX_PASSES = 8


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Where a stored tensor comes from."""

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


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the weights file."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """What was written."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    num_bytes: int
    sha256: str


def write_weights(
    path: Path,
    sources: Sequence[TensorSource],
    *,
    check: Callable[[str, npt.NDArray[np.float32]], None],
    progress: Callable[[int], None] = lambda _: None,
) -> WeightsFile:
    """Stream tensors into one file of fp32 values.

    Args:
        path: The file to create.
        sources: The tensors, in the order they are stored.
        check: Called with every block as (tensor name, values); raises to refuse it.
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
            num_bytes = source.num_bytes
            padding = -position % (PAGE if num_bytes >= PAGE_ALIGN_FROM else ALIGNMENT)
            digest.update(bytes(padding))
            file.write(bytes(padding))
            position += padding
            for block in _blocks(source):
                check(source.name, block)
                data = block.data.cast("B")
                digest.update(data)
                file.write(data)
                progress(len(data))
            stored[source.name] = StoredTensor(source.name, source.shape, position, num_bytes)
            position += num_bytes
            if source.done is not None:
                source.done()
    return WeightsFile(path, stored, position, digest.hexdigest())


def _blocks(source: TensorSource) -> Iterator[npt.NDArray[np.float32]]:
    """The stored tensor as consecutive fp32 blocks of its rows, [rows, ...]."""
    array = source.read()
    if source.transposed:
        array = array.T
    if array.shape != source.shape:
        raise AssertionError(f"{source.name}: read {array.shape}, layout says {source.shape}")
    row_bytes = 4 * math.prod(array.shape[1:])
    rows = max(1, BLOCK_BYTES // row_bytes)
    if source.transposed:
        rows = max(rows, math.ceil(array.shape[0] / MAX_PASSES))
    for start in range(0, array.shape[0], rows):
        yield _to_float32(array[start : start + rows])


def _to_float32(array: Array) -> npt.NDArray[np.float32]:
    out = np.empty(array.shape, np.float32)
    if array.dtype == ml_dtypes.bfloat16:
        # bf16 is the upper half of an fp32; NumPy's integer loops are far faster than a cast.
        bits = out.view(np.uint32)
        bits[...] = array.view(np.uint16)
        bits <<= 16
    else:
        out[...] = array
    return out


def bind_weights(model: ir.Model, weights: WeightsFile) -> None:
    """Point a graph's weight initializers into the weights file; drop none, invent none."""
    for name, value in model.graph.initializers.items():
        if name.startswith("constant."):
            continue
        tensor = weights.tensors[name]
        if value.shape is None or tuple(value.shape) != tensor.shape:
            raise AssertionError(f"{name}: the graph wants {value.shape}, the file has {tensor}")
        value.const_value = ir.ExternalTensor(
            location=weights.path.name,
            offset=tensor.offset,
            length=tensor.num_bytes,
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=weights.path.parent,
        )
