"""The file of packed weights that ONNX Runtime saves, put in order.

ONNX Runtime (1.31) writes packed buffers of less than 1 MB wherever the one before ended. Its
kernels for quantised weights round a buffer's address up to 64 bytes and read from there, so a
buffer that was packed at a multiple of 64 bytes and is mapped elsewhere is read shifted, and the
logits are wrong without an error. `rewrite` moves every buffer to a multiple of `ALIGNMENT`. The
unpacked form of a packed tensor stays in the file: a session packs it once more, one tensor at a
time, and maps the saved buffer only if that gives the same bytes.

Of a packed tensor, external_data also has prepacked_0, ...: "kernel|offset;length;checksum|..."

Source:
    ``ExternalDataInfo`` of ONNX Runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from qwen_runtime.backends.model_file import Entries, with_external_data
from qwen_runtime.errors import BackendError

__all__ = ["ALIGNMENT", "rewrite"]

ALIGNMENT = 4096
"""Bytes; a page, which is a multiple of what any kernel rounds to."""
_COPY_BYTES = 16 << 20


def rewrite(model: Path, data: Path, target: Path) -> None:
    """Copy tensors and buffers of ``data`` to ``target`` and change ``model`` accordingly.

    Args:
        model: The .onnx file that ONNX Runtime saved; replaced by one that names ``target``.
        data: The file of tensors and packed buffers beside it; left as it is.
        target: The file to create, in the same folder.

    Raises:
        BackendError: If the model is not of that form.
        OSError: If a file cannot be read or written.
    """
    with data.open("rb") as source, target.open("xb") as file:
        tensors = _Tensors(source, file, target.name)
        try:
            saved = with_external_data(model.read_bytes(), tensors.moved)
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

    def moved(self, _name: str, entries: Entries) -> Entries:
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
