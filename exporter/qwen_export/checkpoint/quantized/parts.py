"""The stored tensors that a quantised weight is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_export.checkpoint.safetensors_file import SafetensorsFile
from qwen_export.checkpoint.tensors import FLOAT_TYPES, TensorInfo
from qwen_export.errors import CheckpointError, UnsupportedModelError

__all__ = ["Part", "StoredTensors", "require_group_order"]

_COMPARE_BYTES = 1 << 24
"""Compared at a time: bounds the memory that the comparison takes."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a quantised weight."""

    name: str
    """As stored, such as model.layers.0.mlp.up_proj.qweight."""
    file: SafetensorsFile

    @property
    def info(self) -> TensorInfo:
        """What the file's header says of it."""
        return self.file.tensors[self.name]

    def read(self) -> npt.NDArray[Any]:
        """Map it: a read-only view in the stored shape and type."""
        return self.file.read(self.name)

    def equals(self, other: Part) -> bool:
        """Whether another tensor has the same type, shape and bytes."""
        if (self.info.dtype, self.info.shape) != (other.info.dtype, other.info.shape):
            return False
        mine, theirs = (part.read().reshape(-1).view(np.uint8) for part in (self, other))
        same = all(
            np.array_equal(
                mine[start : start + _COMPARE_BYTES], theirs[start : start + _COMPARE_BYTES]
            )
            for start in range(0, mine.size, _COMPARE_BYTES)
        )
        self.release()
        other.release()
        return same

    def release(self) -> None:
        """Drop its pages from memory; views stay valid."""
        self.file.release(self.name)


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """Everything the weights files hold, found by name."""

    files: Mapping[str, SafetensorsFile]
    """The file that holds a tensor, by the tensor's name."""
    folder: Path
    """The checkpoint's folder, for messages."""
    hollow: bool = False
    """Whether the files hold headers alone. What only data tell is then taken to be in order."""

    def find(self, name: str) -> Part | None:
        """The tensor of a name, or None."""
        file = self.files.get(name)
        return None if file is None else Part(name, file)

    def require(
        self, name: str, types: tuple[str, ...], shapes: Mapping[tuple[int, ...], str]
    ) -> Part:
        """Find a tensor that must be there, in one of some types and shapes.

        Args:
            name: The tensor.
            types: NumPy names of the types allowed.
            shapes: The shapes allowed, each with its meaning in words; the usual one first.

        Returns:
            The tensor.

        Raises:
            CheckpointError: If it is missing, or has another type or shape.
        """
        spelled: dict[str, tuple[int, ...]] = {}
        for shape, meaning in shapes.items():
            spelled.setdefault(meaning, shape)  # one spelling of each is enough for a message
        wanted = " or ".join(f"{list(shape)} {meaning}" for meaning, shape in spelled.items())
        part = self.find(name)
        if part is None:
            raise CheckpointError(
                f"{name}: expected {wanted}, but no safetensors file of {self.folder} holds it; "
                "download the checkpoint again",
                path=self.folder,
            )
        info = part.info
        if info.dtype not in types:
            raise CheckpointError(
                f"{name} must be stored as {' or '.join(types)}, got {info.dtype} in "
                f"{info.file.name}",
                path=info.file,
            )
        if info.shape not in shapes:
            raise CheckpointError(
                f"{name}: expected {wanted}, got {list(info.shape)} in {info.file.name}",
                path=info.file,
            )
        return part

    def require_scales(self, name: str, shapes: Mapping[tuple[int, ...], str]) -> Part:
        """`require` for scales, which any float type may hold."""
        return self.require(name, FLOAT_TYPES, shapes)


def require_group_order(part: Part | None, group_size: int) -> None:
    """Refuse groups of inputs that are not consecutive (act-order).

    Args:
        part: The group of every input, [K] int32; None where it is not stored. All -1 stands
            for groups that were never set, as compressed-tensors writes them.
        group_size: Inputs in a group.

    Raises:
        UnsupportedModelError: If an input is in another group than its position says.
    """
    if part is None:
        return
    groups = part.read()
    plain = np.arange(len(groups)) // group_size
    if not (groups == -1).all() and not np.array_equal(groups, plain):
        first = int(np.flatnonzero(groups != plain)[0])
        raise UnsupportedModelError(
            f"{part.name} puts input {first} into group {int(groups[first])} instead of "
            f"{first // group_size}: groups in activation order (desc_act, actorder) are not "
            "supported; take a checkpoint made with desc_act false",
            key=part.name,
        )
    part.release()
