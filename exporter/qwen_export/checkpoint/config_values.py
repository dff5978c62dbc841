"""Typed reading of single values out of a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_export.errors import CheckpointError

__all__ = ["ConfigValues"]


@dataclass(frozen=True, slots=True)
class ConfigValues:
    """A JSON object whose values are read by key, type and range.

    A missing key takes the default. A wrong type is an error that names the key, the file and the
    value; true and false are never taken for numbers.
    """

    raw: Mapping[str, Any]
    path: Path
    prefix: str = ""
    """Put before every key in messages, for an object inside another one."""

    def integer(self, key: str, default: int, *, minimum: int = 1) -> int:
        """Read an integer of at least ``minimum``."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"must be an integer >= {minimum}", value)
        return value

    def optional_integer(self, key: str, default: int | None, *, minimum: int = 1) -> int | None:
        """Read an integer of at least ``minimum``, or null."""
        if self.raw.get(key, default) is None:
            return None
        return self.integer(key, 0 if default is None else default, minimum=minimum)

    def number(self, key: str, default: float, *, zero: bool = False) -> float:
        """Read a finite number above zero, or from zero on with ``zero``."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "must be a number", value)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise self.error(key, f"must be finite and {'>=' if zero else '>'} 0", value)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Read true or false."""
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false", value)
        return value

    def text(self, key: str, default: str) -> str:
        """Read a string."""
        value = self.raw.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "must be a string", value)
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Read an object; missing and null are empty."""
        value = self.raw.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(key, "must be an object or null", value)
        return value

    def token_ids(self, key: str) -> int | tuple[int, ...] | None:
        """Read a token id, a list of them, or null."""
        value = self.raw.get(key)
        for token in value if isinstance(value, list) else () if value is None else (value,):
            if isinstance(token, bool) or not isinstance(token, int):
                raise self.error(key, "must be a token id, a list of them or null", value)
        return tuple(value) if isinstance(value, list) else value

    def error(self, key: str, rule: str, value: object) -> CheckpointError:
        """Make the error for a value that breaks a rule.

        Args:
            key: The key at fault.
            rule: What must hold, as in "must be an integer".
            value: What was given.

        Returns:
            The error, to be raised by the caller.
        """
        return CheckpointError(
            f"{self.path}: {self.prefix}{key} {rule}, got {value!r}", path=self.path
        )
