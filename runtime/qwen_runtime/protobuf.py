"""Protocol Buffers messages as fields, since the onnx package is not needed to run a bundle.

An .onnx file is such a message: fields of a number and a wire type, one after the other, some of
them messages again.

Source:
    https://protobuf.dev/programming-guides/encoding: a field is (number << 3 | type), then a
    varint, 8 or 4 bytes, or a length and so many bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = [
    "BYTES",
    "FIXED32",
    "FIXED64",
    "VARINT",
    "Field",
    "fields",
    "message",
    "varint",
    "varint_of",
]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types."""

Field = tuple[int, int, bytes]
"""Number, wire type and contents; of a varint or a fixed number, its encoded bytes."""


def fields(encoded: bytes) -> Iterator[Field]:
    """The fields of a message, in their order.

    Raises:
        IndexError: If it ends within a number.
        ValueError: If a field ends after it, or has a wire type that is not listed above.
    """
    position = 0
    while position < len(encoded):
        tag, position = varint(encoded, position)
        number, wire = tag >> 3, tag & 7
        start = position
        if wire == VARINT:
            _, position = varint(encoded, position)
        elif wire == BYTES:
            length, start = varint(encoded, position)
            position = start + length
        elif wire in (FIXED64, FIXED32):
            position += 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"field {number} has wire type {wire}")
        if position > len(encoded):
            raise ValueError(f"field {number} ends after its message")
        yield number, wire, encoded[start:position]


def message(parts: Iterable[Field]) -> bytes:
    """The message of some fields."""
    encoded = []
    for number, wire, contents in parts:
        encoded.append(varint_of(number << 3 | wire))
        if wire == BYTES:
            encoded.append(varint_of(len(contents)))
        encoded.append(contents)
    return b"".join(encoded)


def varint(encoded: bytes, position: int) -> tuple[int, int]:
    """The number at a position, seven bits a byte and the lowest first, and where it ends.

    Raises:
        IndexError: If the message ends within it.
    """
    value = shift = 0
    while True:
        byte = encoded[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def varint_of(value: int) -> bytes:
    """The encoding of a number of at least 0."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
