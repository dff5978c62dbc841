"""The file of packed weights that ONNX Runtime saves, put in order.

ONNX Runtime (1.31) writes packed buffers of less than 1 MB wherever the one before ended. Its
kernels for quantised weights round a buffer's address up to 64 bytes and read from there, so a
buffer that was packed at a multiple of 64 bytes and is mapped elsewhere is read shifted, and the
logits are wrong without an error. `rewrite` moves every buffer to a multiple of `ALIGNMENT`. The
unpacked form of a packed tensor stays in the file: a session packs it once more, one tensor at a
time, and maps the saved buffer only if that gives the same bytes.

The three messages on the way to the positions of tensors are read and written here::

    ModelProto.graph (7) - GraphProto.initializer (5) - TensorProto.external_data (13)
        - key (1): offset, length, prepacked_0, ...
        - value (2): bytes; for a packed tensor "kernel|offset;length;checksum|offset;..."

Source:
    onnx.proto of ONNX 1.23; ``ExternalDataInfo`` of ONNX Runtime for the packed value.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qwen_runtime.errors import BackendError
from qwen_runtime.protobuf import BYTES, fields, message

__all__ = ["ALIGNMENT", "rewrite"]

ALIGNMENT = 4096
"""Bytes; a page, which is a multiple of what any kernel rounds to."""
_COPY_BYTES = 16 << 20
_GRAPH, _INITIALIZER, _EXTERNAL_DATA = 7, 5, 13
_KEY, _VALUE = 1, 2


def rewrite(model: Path, data: Path, target: Path) -> None:
    """Copy tensors and buffers of ``data`` to ``target`` and change ``model`` accordingly.

    Args:
        model: The .onnx file that ONNX Runtime saved; replaced by one that names ``target``.
        data: The file of tensors and packed buffers beside it; left as it is.
        target: The file to create, in the same folder.

    Raises:
        BackendError: If the model is not of the form described above.
        OSError: If a file cannot be read or written.
    """
    with data.open("rb") as source, target.open("xb") as file:
        tensors = _Tensors(source, file, target.name)
        try:
            saved = _inside(model.read_bytes(), _GRAPH, lambda graph: _graph(graph, tensors))
        except (IndexError, KeyError, UnicodeDecodeError, ValueError) as error:
            raise BackendError(
                f"{model} must be a model that ONNX Runtime saved with packed weights: {error!r}"
            ) from error
    model.write_bytes(saved)


class _Tensors:
    """Moves what external_data names to its place in the new file."""

    def __init__(self, source: BinaryIO, file: BinaryIO, location: str) -> None:
        self._source, self._file, self._location = source, file, location
        self._end = 0

    def moved(self, entries: dict[str, str]) -> dict[str, str]:
        """The entries of one tensor for the new file."""
        offset = self._copy(int(entries["offset"]), int(entries["length"]))
        moved = {**entries, "location": self._location, "offset": str(offset)}
        for key, value in entries.items():
            if key.startswith("prepacked_"):
                moved[key] = self._buffers(value)
        return moved

    def _buffers(self, value: str) -> str:
        kernel, *buffers = value.split("|")
        moved = []
        for buffer in buffers:
            offset, length, checksum = buffer.split(";")
            moved.append(f"{self._copy(int(offset), int(length))};{length};{checksum}")
        return "|".join([kernel, *moved])

    def _copy(self, offset: int, length: int) -> int:
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._source.seek(offset)
        self._file.seek(start)  # what is skipped reads as zeros
        self._end = start + length
        while length:
            block = self._source.read(min(length, _COPY_BYTES))
            if not block:
                raise ValueError(f"the file of tensors ends before byte {offset + length}")
            self._file.write(block)
            length -= len(block)
        return start


def _graph(graph: bytes, tensors: _Tensors) -> bytes:
    return _inside(graph, _INITIALIZER, lambda tensor: _tensor(tensor, tensors))


def _tensor(tensor: bytes, tensors: _Tensors) -> bytes:
    entries = {}
    others = []
    for field in fields(tensor):
        if field[0] == _EXTERNAL_DATA:
            entry = {number: contents.decode() for number, _, contents in fields(field[2])}
            entries[entry[_KEY]] = entry[_VALUE]
        else:
            others.append(field)
    if not entries:
        return tensor
    return message(others) + message(
        (
            _EXTERNAL_DATA,
            BYTES,
            message([(_KEY, BYTES, key.encode()), (_VALUE, BYTES, value.encode())]),
        )
        for key, value in tensors.moved(entries).items()
    )


def _inside(outer: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """The message with the contents of every field of that number changed."""
    return message(
        (field[0], field[1], change(field[2])) if field[0] == number else field
        for field in fields(outer)
    )
