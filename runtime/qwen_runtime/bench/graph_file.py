"""The little of an ONNX file that tells which weights a step reads, without the onnx package.

Only the fields of onnx.proto3 that are named below are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_runtime.errors import BundleError
from qwen_runtime.protobuf import VARINT, fields, varint

__all__ = ["ExternalTensor", "read_external_tensors"]

# Field numbers of onnx.proto3.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

Field = tuple[int, int | bytes]
"""A field's number, and its value: a number, or the bytes of a text or nested message."""


@dataclass(frozen=True, slots=True)
class ExternalTensor:
    """A weight that lies in a file beside the graph."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Where it begins in that file, in bytes."""
    num_bytes: int
    readers: frozenset[str]
    """Operators that take it as an input."""
    cast_to: int | None
    """ONNX's number of the type that a Cast makes of it; None where none does."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_external_tensors(path: Path) -> list[ExternalTensor]:
    """Read the weights that a graph refers to, and who reads them.

    Args:
        path: An ONNX file that holds no weights itself; it is read as a whole.

    Raises:
        BundleError: If it cannot be read or is no ONNX file.
    """
    try:
        return _tensors(path.read_bytes())
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BundleError(
            f"{path} must be a readable ONNX file, but is damaged ({error}); copy the bundle again",
            path=path,
        ) from error


def _tensors(model: bytes) -> list[ExternalTensor]:
    graph = _bytes(dict(_fields(model))[_MODEL_GRAPH])
    readers: dict[str, set[str]] = {}
    casts: dict[str, int] = {}
    initializers = []
    for number, value in _fields(graph):
        if number == _GRAPH_INITIALIZER:
            initializers.append(_bytes(value))
        elif number == _GRAPH_NODE:
            _read_node(_bytes(value), readers, casts)
    tensors = (_tensor(initializer, readers, casts) for initializer in initializers)
    return [tensor for tensor in tensors if tensor is not None]


def _read_node(node: bytes, readers: dict[str, set[str]], casts: dict[str, int]) -> None:
    inputs, op_type, target = [], "", None
    for number, value in _fields(node):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_OP_TYPE:
            op_type = _text(value)
        elif number == _NODE_ATTRIBUTE:
            attribute = dict(_fields(_bytes(value)))
            if attribute.get(_ATTRIBUTE_NAME) == b"to":
                target = attribute[_ATTRIBUTE_INT]
    for name in inputs:
        readers.setdefault(name, set()).add(op_type)
        if op_type == "Cast" and isinstance(target, int):
            casts[name] = target


def _tensor(
    tensor: bytes, readers: dict[str, set[str]], casts: dict[str, int]
) -> ExternalTensor | None:
    """A weight; None for a constant inside the graph."""
    name, shape, external = "", list[int](), dict[str, str]()
    for number, value in _fields(tensor):
        if number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == _TENSOR_EXTERNAL:
            entry = dict(_fields(_bytes(value)))
            external[_text(entry[_ENTRY_KEY])] = _text(entry[_ENTRY_VALUE])
    if "length" not in external:
        return None
    offset, length = int(external.get("offset", 0)), int(external["length"])
    operators = frozenset(readers.get(name, ()))
    return ExternalTensor(name, tuple(shape), offset, length, operators, casts.get(name))


def _fields(encoded: bytes) -> Iterator[Field]:
    for number, wire, contents in fields(encoded):
        yield number, varint(contents, 0)[0] if wire == VARINT else contents


def _varints(packed: bytes) -> list[int]:
    values, at = [], 0
    while at < len(packed):
        value, at = varint(packed, at)
        values.append(value)
    return values


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where a message should be")
    return value


def _text(value: int | bytes) -> str:
    return _bytes(value).decode("utf-8")
