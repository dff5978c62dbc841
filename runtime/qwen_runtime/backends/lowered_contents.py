"""Initialisers of lowered graphs, made from the bundle's weights file piece by piece.

Pieces are contiguous arrays whose bytes, one after the other, are the initialiser in the graph's
type. A large tensor is never held whole in another form.

Shape letters: K inputs (the dimension whose blocks share a scale), N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import BackendError, BundleError
from qwen_runtime.lowered_description import InitializerEntry, PartEntry

__all__ = ["initializer_bytes", "pieces"]

Array = npt.NDArray[np.generic]

_ELEMENT_BYTES = {"float": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
_PIECE = 4 << 20
"""Elements of a piece at most, but for one row or column."""
_STORED: dict[str, npt.DTypeLike] = {"float": "<f4", "int4": "u1", "int8": "i1"}
"""Stored type to what its bytes are read as; two 4-bit codes are a byte."""
_ZERO = {"int4": 8, "int8": 128}
"""What makes a code unsigned: MatMulNBits' zero point where it is given none."""


def initializer_bytes(entry: InitializerEntry) -> int:
    """Bytes of an initialiser in the graph's type."""
    return math.prod(entry.shape) * _ELEMENT_BYTES[entry.dtype]


def pieces(entry: InitializerEntry, weights: Path) -> Iterator[Array]:
    """The initialiser's content, in order.

    Args:
        entry: What it is made of.
        weights: The bundle's weights file.

    Raises:
        BackendError: If a number does not fit the graph's type.
        BundleError: If the parts do not make what the graph has.
    """
    made, wanted = 0, initializer_bytes(entry)
    for piece in _laid_out(entry, weights):
        made += piece.nbytes
        if made > wanted:  # given out, it would be written over what lies behind
            raise _mismatch(entry, f"its parts must make {wanted} bytes, but make {made} or more")
        yield piece
    if made != wanted:
        raise _mismatch(entry, f"its parts must make {wanted} bytes, but make {made}")


def _laid_out(entry: InitializerEntry, weights: Path) -> Iterator[Array]:
    parts = [_stored(part, entry, weights) for part in entry.parts]
    if entry.layout == "plain":
        for block in _joined(parts, entry):
            yield _cast(block, entry)
    elif entry.layout == "matmul_nbits_scales":
        # Parts follow each other along N, the first axis of what is made.
        for part in _along(entry, parts, axis=1):
            for start, stop in _ranges(part.shape[1], part.shape[0]):
                yield _cast(np.ascontiguousarray(part[:, start:stop].T), entry)
    else:
        for part, shape in zip(_along(entry, parts, axis=1), _shapes(entry), strict=True):
            yield from _packed_columns(part, shape, entry)


def _stored(part: PartEntry, entry: InitializerEntry, weights: Path) -> Array:
    """A part as it lies in the file; 4-bit codes by the byte."""
    dtype = np.dtype(_STORED[part.dtype])
    count = math.prod(part.shape)
    shape = (-(-count // 2),) if part.dtype == "int4" else part.shape
    if math.prod(shape) * dtype.itemsize != part.num_bytes:
        raise _mismatch(
            entry,
            f"{part.name} of {list(part.shape)} {part.dtype} cannot have {part.num_bytes} bytes",
        )
    stored: Array = np.memmap(weights, dtype, "r", part.offset, shape)
    return stored


def _joined(parts: list[Array], entry: InitializerEntry) -> Iterator[Array]:
    if len(parts) == 1 or entry.axis == 0:
        for part in parts:
            flat = part.reshape(-1)
            for start in range(0, flat.size, _PIECE):
                yield flat[start : start + _PIECE]
        return
    rows = {part.shape[: entry.axis] for part in parts}
    if len(rows) != 1 or entry.axis >= parts[0].ndim:
        raise _mismatch(entry, f"its parts cannot be joined along axis {entry.axis}")
    flat_parts = [part.reshape(math.prod(part.shape[: entry.axis]), -1) for part in parts]
    width = sum(part.shape[1] for part in flat_parts)
    for start, stop in _ranges(flat_parts[0].shape[0], width):
        yield np.concatenate([part[start:stop] for part in flat_parts], axis=1)


def _packed_columns(
    part: Array, shape: tuple[int, ...], entry: InitializerEntry
) -> Iterator[Array]:
    """Codes [K, N] as MatMulNBits takes them, output by output."""
    rows, columns = shape
    if entry.parts[0].dtype == "int8" or columns % 2:
        codes = _codes(part, shape, entry)
        for start, stop in _ranges(columns, rows):
            yield _pack(codes[:, start:stop].T, entry)
        return
    stored = part.reshape(rows, columns // 2)
    for start, stop in _ranges(columns // 2, 2 * rows):
        yield _pack(_nibbles(stored[:, start:stop]).T, entry)


def _codes(part: Array, shape: tuple[int, ...], entry: InitializerEntry) -> npt.NDArray[np.int8]:
    """Codes by the element; a row of an odd number of 4-bit ones does not begin at a byte."""
    if entry.parts[0].dtype == "int8":
        return part.view(np.int8)
    return _nibbles(part[None])[0, : math.prod(shape)].reshape(shape)


def _nibbles(stored: Array) -> npt.NDArray[np.int8]:
    """Signed 4-bit codes, [rows, 2 * bytes], of bytes [rows, bytes]; the low half is the first."""
    codes = stored.view(np.uint8)
    pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(stored.shape[0], -1)
    return (pairs.astype(np.int8) ^ 8) - np.int8(8)


def _pack(codes: npt.NDArray[np.int8], entry: InitializerEntry) -> Array:
    """Unsigned codes of some outputs, [N, K/block, block * bits / 8], from signed ones [N, K]."""
    block = entry.block_size
    if block is None or codes.shape[1] % block or block % 2:
        raise _mismatch(entry, f"block_size must be even and divide {codes.shape[1]}, got {block}")
    kind = entry.parts[0].dtype
    unsigned = (codes.astype(np.int16) + _ZERO[kind]).astype(np.uint8)
    unsigned = unsigned.reshape(codes.shape[0], -1, block)
    if kind == "int4":
        return np.ascontiguousarray(unsigned[..., 0::2] | (unsigned[..., 1::2] << 4), np.uint8)
    return unsigned


def _along(entry: InitializerEntry, parts: list[Array], *, axis: int) -> list[Array]:
    if len(parts) > 1 and entry.axis != axis:
        raise _mismatch(entry, f"axis must be {axis} for {entry.layout}, got {entry.axis}")
    return parts


def _shapes(entry: InitializerEntry) -> list[tuple[int, ...]]:
    if any(len(part.shape) != 2 or part.dtype not in _ZERO for part in entry.parts):
        raise _mismatch(entry, f"{entry.layout} takes codes of two dimensions")
    return [part.shape for part in entry.parts]


def _ranges(count: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of so many rows (or columns) of ``width`` elements each, a piece at a time."""
    step = max(1, _PIECE // width)
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _cast(block: Array, entry: InitializerEntry) -> Array:
    """A block of stored floats in the graph's type, bfloat16 as its bits; codes as they are."""
    stored = {part.dtype for part in entry.parts}
    if stored == {entry.dtype}:
        return np.ascontiguousarray(block)
    if stored != {"float"} or entry.dtype not in ("float16", "bfloat16"):
        names = " and ".join(sorted(stored))
        raise _mismatch(entry, f"{entry.layout} cannot make {entry.dtype} of {names}")
    if entry.dtype == "bfloat16":
        # To the nearest, ties to even: half of what is cut off, and one more where the last kept
        # bit is odd, is added before cutting.
        bits = np.ascontiguousarray(block).view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(block, np.float16)
    if np.isinf(half).any():
        largest = float(np.abs(block.astype(np.float32)).max())
        raise BackendError(
            f"{entry.name} must fit float16, whose largest number is 65504, got {largest:.6g}; make "
            "the graphs again with --compute-dtype bf16"
        )
    return half


def _mismatch(entry: InitializerEntry, what: str) -> BundleError:
    return BundleError(
        f"initialiser {entry.name}: {what}; the graphs' description is damaged: "
        "make them again with --overwrite"
    )
