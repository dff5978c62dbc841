"""Changes to the bytes of an .onnx file, where the onnx package is not at hand.

What is read and written on the way::

    ModelProto.graph (7) - GraphProto.node (1)        - NodeProto.op_type (4), attribute (5)
                                                          - AttributeProto.name (1), i (3)
                         - GraphProto.initializer (5) - TensorProto.name (8), external_data (13)
                                                          - key (1), value (2)

Source:
    onnx.proto of ONNX 1.23.
"""

from __future__ import annotations

from collections.abc import Callable

from qwen_runtime.protobuf import BYTES, VARINT, fields, message, varint_of

__all__ = ["Entries", "with_attribute", "with_external_data"]

Entries = dict[str, str]
"""What a tensor says of its data in another file: location, offset, length, and more."""

_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_OP_TYPE, _ATTRIBUTE = 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_TENSOR_NAME, _EXTERNAL_DATA = 8, 13
_KEY, _VALUE = 1, 2


def with_external_data(model: bytes, place: Callable[[str, Entries], Entries]) -> bytes:
    """The model with other places for the initializers whose data are in another file.

    Args:
        model: A ModelProto.
        place: Given an initializer's name and entries, says the new ones.

    Raises:
        IndexError, KeyError, UnicodeDecodeError, ValueError: If it is no such message.
    """

    def tensor(encoded: bytes) -> bytes:
        name, entries, others = "", {}, []
        for field in fields(encoded):
            if field[0] == _EXTERNAL_DATA:
                entry = {number: contents.decode() for number, _, contents in fields(field[2])}
                entries[entry[_KEY]] = entry[_VALUE]
            else:
                others.append(field)
                if field[0] == _TENSOR_NAME:
                    name = field[2].decode()
        if not entries:
            return encoded
        return message(others) + message(
            (
                _EXTERNAL_DATA,
                BYTES,
                message([(_KEY, BYTES, key.encode()), (_VALUE, BYTES, value.encode())]),
            )
            for key, value in place(name, entries).items()
        )

    return _inside(model, _GRAPH, lambda graph: _inside(graph, _INITIALIZER, tensor))


def with_attribute(model: bytes, op_type: str, name: str, value: int) -> bytes:
    """The model with another value of an integer attribute that nodes of a type have.

    Args:
        model: A ModelProto.
        op_type: Of the nodes.
        name: Of the attribute; a node without it stays as it is.
        value: At least 0.

    Raises:
        IndexError, UnicodeDecodeError, ValueError: If it is no such message.
    """

    def attribute(encoded: bytes) -> bytes:
        parts = list(fields(encoded))
        if (_ATTRIBUTE_NAME, BYTES, name.encode()) not in parts:
            return encoded
        kept = [part for part in parts if part[0] != _ATTRIBUTE_INT]
        return message([*kept, (_ATTRIBUTE_INT, VARINT, varint_of(value))])

    def node(encoded: bytes) -> bytes:
        if (_OP_TYPE, BYTES, op_type.encode()) not in fields(encoded):
            return encoded
        return _inside(encoded, _ATTRIBUTE, attribute)

    return _inside(model, _GRAPH, lambda graph: _inside(graph, _NODE, node))


def _inside(outer: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """The message with the contents of every field of that number changed."""
    return message(
        (field[0], field[1], change(field[2])) if field[0] == number else field
        for field in fields(outer)
    )
