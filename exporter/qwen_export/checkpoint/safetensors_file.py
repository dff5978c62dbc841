"""One safetensors file: its checked header, and its data mapped without a copy."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qwen_export.checkpoint.tensors import TensorInfo
from qwen_export.errors import CheckpointError

__all__ = ["SafetensorsFile"]

# The format's name of a type -> NumPy's. Plain weights are floats; the others are parts of
# quantised ones.
_STORED_TYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_NUMPY_TYPES = {dtype.name: dtype for dtype in _STORED_TYPES.values()}
_LENGTH_BYTES = 8  # the header's length, little endian, opens the file


class SafetensorsFile:
    """A safetensors file whose header was checked against its size.

    The data are mapped on first use, read-only; nothing is copied.

    Attributes:
        path: The file.
        tensors: What it holds, by name.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Args:
            path: The file.

        Raises:
            CheckpointError: If the file cannot be read, is damaged or truncated, or stores a
                tensor in a type that no supported checkpoint has.
        """
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = _read_header(path)
        self._map: mmap.mmap | None = None

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Map a tensor.

        Args:
            name: A name in ``tensors``.

        Returns:
            A read-only view of the file, in the stored shape and type (of ml_dtypes for BF16 and
            F8_E4M3). It stays valid for as long as it is referenced, also after ``release``.
        """
        info = self.tensors[name]
        dtype = _NUMPY_TYPES[info.dtype]
        if info.num_bytes == 0:
            return np.empty(info.shape, dtype)
        count = info.num_bytes // dtype.itemsize
        flat = np.frombuffer(self._mapped(), dtype, count, info.offset)
        return flat.reshape(info.shape)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from this process's memory.

        Views stay valid: what is read again comes back from the file. Between the row blocks of a
        large tensor this keeps memory near the size of a block.

        Args:
            name: A name in ``tensors``.
        """
        info = self.tensors[name]
        if self._map is None or info.num_bytes == 0 or not hasattr(mmap, "MADV_DONTNEED"):
            return
        # madvise wants a page boundary; neighbours that share the page fault back in.
        start = info.offset - info.offset % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.num_bytes - start)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            try:
                with self.path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise _unreadable(self.path, error) from error
        return self._map


def _read_header(path: Path) -> dict[str, TensorInfo]:
    try:
        # The library checks the header's length, the JSON, and that the offsets cover the file.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} must be a complete safetensors file, but is truncated or damaged "
            f"({error}); download it again",
            path=path,
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    header.pop("__metadata__", None)
    base = _LENGTH_BYTES + length
    return {name: _tensor_info(path, base, name, entry) for name, entry in header.items()}


def _tensor_info(path: Path, base: int, name: str, entry: Mapping[str, Any]) -> TensorInfo:
    if entry["dtype"] not in _STORED_TYPES:
        raise CheckpointError(
            f"{name} in {path.name} is stored as {entry['dtype']}, which is not supported; "
            f"{', '.join(_STORED_TYPES)} are",
            path=path,
        )
    start, end = entry["data_offsets"]
    dtype = _STORED_TYPES[entry["dtype"]].name
    return TensorInfo(dtype, tuple(entry["shape"]), path, base + start, end - start)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}", path=path)
