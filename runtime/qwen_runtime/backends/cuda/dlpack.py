"""Device memory as ONNX Runtime's tensors, without a copy.

ONNX Runtime shares an initialiser between sessions only where its memory belongs to the caller, and
takes such memory of a device only as DLPack.

Source: dlpack.h 0.x, ``DLManagedTensor``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

__all__ = ["ELEMENT_BYTES", "ONNX_TYPES", "tensor_at"]

_CODES = {
    "float": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "uint8": (1, 8),
    "int8": (0, 8),
    "int32": (0, 32),
    "int64": (0, 64),
}
"""ONNX's name of a type to DLPack's code and bits."""
ELEMENT_BYTES = {name: bits // 8 for name, (_, bits) in _CODES.items()}
"""By ONNX's name of a type."""
ONNX_TYPES = {
    "float": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "float16": 10,
    "bfloat16": 16,
}
"""ONNX's name of a type to its number in TensorProto.DataType."""


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("num_axes", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def tensor_at(ort: Any, address: int, shape: Sequence[int], dtype: str, device: int) -> Any:
    """An onnxruntime.OrtValue over memory that its caller keeps until the value is gone.

    Args:
        ort: The module onnxruntime.
        address: Where its elements lie, in order and without gaps.
        shape: Its shape.
        dtype: Its type, by ONNX's name.
        device: DLPack's number of the device; the first one of its kind.
    """
    return ort.OrtValue.from_dlpack(_capsule(address, shape, dtype, device))


def _capsule(address: int, shape: Sequence[int], dtype: str, device: int) -> object:
    api = ctypes.pythonapi
    allocate = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("PyMem_RawMalloc", api))
    # Description and shape are one block that C's own deleter can free, at exit as well, when no
    # callback into Python would be safe.
    size = ctypes.sizeof(_ManagedTensor)
    block = allocate(size + ctypes.sizeof(ctypes.c_int64) * len(shape))
    if block is None:
        raise MemoryError
    (ctypes.c_int64 * len(shape)).from_address(block + size)[:] = list(shape)
    managed = _ManagedTensor.from_address(block)
    code, bits = _CODES[dtype]
    managed.tensor = _Tensor(
        address, _Device(device, 0), len(shape), _DataType(code, bits, 1), block + size, None, 0
    )
    managed.context = None
    managed.deleter = ctypes.cast(api.PyMem_RawFree, ctypes.c_void_p)
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(("PyCapsule_New", api))(block, b"dltensor", None)
