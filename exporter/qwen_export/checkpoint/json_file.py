"""Reading the JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from qwen_export.errors import CheckpointError

__all__ = ["read_json_object", "read_text"]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file of a checkpoint.

    Args:
        path: The file to read.

    Returns:
        Its text.

    Raises:
        CheckpointError: If the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", path=path) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} must be UTF-8 text, but byte {error.start} is not; download it again",
            path=path,
        ) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: The file to read.

    Returns:
        The object. Key order is kept.

    Raises:
        CheckpointError: If the file cannot be read, is not JSON, holds NaN or Infinity, or holds
            something other than an object.
    """
    try:
        value = json.loads(read_text(path), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} must be valid JSON, but line {error.lineno} column {error.colno} is not "
            f"({error.msg}); download it again",
            path=path,
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} must be valid JSON, but {error}", path=path) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, but holds a {type(value).__name__}", path=path
        )
    return value


def _refuse_constant(name: str) -> NoReturn:
    # Python reads NaN and Infinity, which no JSON standard has and no setting here may be.
    raise ValueError(f"it holds {name}")
