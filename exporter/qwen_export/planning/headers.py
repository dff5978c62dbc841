"""The headers of safetensors files, whatever they hold: from a folder or from the hub."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_export.checkpoint.hub import (
    refuse_other_formats,
    reports_hub_errors,
    weights_names,
)
from qwen_export.errors import CheckpointError

__all__ = ["HeaderTensor", "fetch_headers", "read_headers"]

_SINGLE = "model.safetensors"
_LENGTH_BYTES = 8  # the header's length, little endian, opens the file
_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor as a header describes it, in the format's words."""

    name: str
    dtype: str
    """The format's name of the element type, "BF16", "I32", "F8_E4M3", ..."""
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_values(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def read_headers(folder: Path) -> list[HeaderTensor]:
    """Read the headers of a folder's weights; none where it has no safetensors files.

    Raises:
        CheckpointError: If a file is missing or its header is damaged.
    """
    names = [_SINGLE] if (folder / _SINGLE).is_file() else weights_names(folder)
    return [tensor for name in names for tensor in _tensors(_read(folder / name))]


def fetch_headers(repo_id: str, small_files: Path, stand_in: Path) -> None:
    """Make a folder that opens as the checkpoint does, without its weights.

    The headers are fetched by HTTP range requests. The weights files of the folder have them, and
    holes where the data would be: full size, no space.

    Args:
        repo_id: The model.
        small_files: Everything but the weights; the folder's name is the commit.
        stand_in: The folder to make.

    Raises:
        CheckpointError: If headers cannot be fetched, or the model has no safetensors weights.
    """
    shutil.copytree(small_files, stand_in, ignore=shutil.ignore_patterns("*.safetensors"))
    names = weights_names(small_files) or [_SINGLE]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        headers = list(pool.map(lambda name: _fetch(repo_id, small_files.name, name), names))
    for name, header in zip(names, headers, strict=True):
        _write_hollow(stand_in / name, header)


def _fetch(repo_id: str, commit: str, name: str) -> dict[str, Any]:
    from huggingface_hub import HfApi, errors

    if Path(name).name != name:
        # A name with a folder in it could point outside the folder that is made.
        raise CheckpointError(f"{repo_id}: a weights file must lie in its main folder, got {name}")
    with reports_hub_errors(repo_id, commit):
        try:
            found = HfApi().parse_safetensors_file_metadata(repo_id, name, revision=commit)
        except errors.SafetensorsParsingError as error:
            raise CheckpointError(f"{repo_id}: {name} is damaged: {error}") from error
        except errors.EntryNotFoundError as error:
            if name == _SINGLE:
                refuse_other_formats(repo_id, commit)
            raise CheckpointError(
                f"{repo_id}: {name} is missing, though the index of the weights names it"
            ) from error
    return {
        tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for tensor, info in found.tensors.items()
    }


def _write_hollow(path: Path, header: Mapping[str, Any]) -> None:
    blob = json.dumps(header).encode()
    num_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    try:
        with path.open("xb") as file:
            file.write(len(blob).to_bytes(_LENGTH_BYTES, "little") + blob)
            file.truncate(_LENGTH_BYTES + len(blob) + num_bytes)
    except OSError as error:
        raise CheckpointError(
            f"{path} stands for weights of {num_bytes} bytes and must be creatable as a sparse "
            f"file: {error.strerror}; set TMPDIR to a folder on another file system",
            path=path,
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(min(length, _MOST_HEADER_BYTES)))
            header.pop("__metadata__", None)
            _tensors(header)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=path) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} must begin with the header of a safetensors file, but does not ({error}); "
            "download it again",
            path=path,
        ) from error
    return dict(header)


def _tensors(header: Mapping[str, Any]) -> Sequence[HeaderTensor]:
    return [
        HeaderTensor(
            name,
            str(entry["dtype"]),
            tuple(int(size) for size in entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    ]
