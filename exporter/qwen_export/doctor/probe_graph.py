"""The smallest graph that asks of an engine what the graphs of a bundle do.

    query, key, value [1, 1, 2, 4] ──► Attention (opset 24) ──► answer [1, 1, 2, 4]

Written as protobuf by hand: the package onnx is not there where bundles are only run.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["INPUTS", "attention_model", "expected_answer", "probe_inputs"]

INPUTS = ("query", "key", "value")
_SHAPE = (1, 1, 2, 4)
_OPSET = 24
_IR_VERSION = 11
"""The first that knows opset 24."""
_FLOAT = 1
"""TensorProto.DataType."""


def attention_model() -> bytes:
    """The graph, serialised. Field numbers are those of onnx.proto3."""
    names = b"".join(_text(1, name) for name in INPUTS)
    node = names + _text(2, "answer") + _text(4, "Attention")
    values = b"".join(_bytes(11, _value(name)) for name in INPUTS)
    graph = _bytes(1, node) + _text(2, "probe") + values + _bytes(12, _value("answer"))
    return _int(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _int(2, _OPSET))


def probe_inputs() -> dict[str, npt.NDArray[np.float32]]:
    """Inputs by name. Keys of zeros, so that every query attends to all alike."""
    value = np.arange(8, dtype=np.float32).reshape(_SHAPE)
    return {"query": value + 1, "key": np.zeros(_SHAPE, np.float32), "value": value}


def expected_answer() -> npt.NDArray[np.float32]:
    """What attention makes of `probe_inputs`: the mean value, for both queries."""
    mean = probe_inputs()["value"].mean(axis=2, keepdims=True)
    return np.broadcast_to(mean, _SHAPE)


def _value(name: str) -> bytes:
    """A ValueInfoProto: a name, and a float tensor's type with its shape."""
    shape = b"".join(_bytes(1, _int(1, size)) for size in _SHAPE)
    return _text(1, name) + _bytes(2, _bytes(1, _int(1, _FLOAT) + _bytes(2, shape)))


def _int(number: int, value: int) -> bytes:
    """A varint field; below 128 both parts are a byte."""
    return bytes([number << 3, value])


def _text(number: int, value: str) -> bytes:
    return _bytes(number, value.encode())


def _bytes(number: int, value: bytes) -> bytes:
    """A length-delimited field; the length is a varint of seven bits a byte."""
    length, rest = [], len(value)
    while rest >= 0x80:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([number << 3 | 2, *length, rest]) + value
