"""What the exporter raises.

ExportError
├── CheckpointError          a file of the checkpoint is missing, damaged or contradicts another; .path
├── UnsupportedModelError    the checkpoint is sound, but asks for something not supported; .key
├── OptionError              options exclude each other, or have no use for this model
├── OutputError              the place to write to exists, is full or cannot be written; .path
├── ParityError              the exported model does not answer like the original; .path
└── TargetError              an engine cannot be built from the graph, or would give wrong numbers; .names
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = [
    "CheckpointError",
    "ExportError",
    "OptionError",
    "OutputError",
    "ParityError",
    "TargetError",
    "UnsupportedModelError",
]


class ExportError(Exception):
    """Base of everything the exporter raises on purpose."""


class _PathError(ExportError):
    def __init__(self, message: str, *, path: str | Path | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)


class CheckpointError(_PathError):
    """A file of the checkpoint is missing, damaged, or contradicts another one."""


class UnsupportedModelError(ExportError):
    """The checkpoint is sound but asks for something that is not supported.

    Attributes:
        key: The config key or tensor name that asks for it, or None.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class OptionError(ExportError):
    """Options are not offered, exclude each other, or have no use for this model."""


class OutputError(_PathError):
    """The output folder exists, is full, or cannot be written."""


class ParityError(_PathError):
    """The exported model does not answer like the original."""


class TargetError(ExportError):
    """An engine cannot be built from a graph, or the engine would give wrong numbers.

    Attributes:
        names: The inputs, nodes or dimensions at fault.
    """

    def __init__(self, message: str, *, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)
