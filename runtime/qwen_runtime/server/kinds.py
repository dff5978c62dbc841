"""Kinds of values in a request: each is read, and described by a JSON schema."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qwen_runtime.errors import RequestError

__all__ = [
    "Kind",
    "Schema",
    "any_object",
    "array",
    "boolean",
    "either",
    "integer",
    "mapping",
    "number",
    "one_of",
    "text",
    "wrong",
]

Schema = dict[str, Any]
"""A JSON schema (2020-12, as in OpenAPI 3.1)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of value."""

    name: str
    """What a value must be, in words: "an integer in [0, 20]"."""
    read: Callable[[Any, str], Any]
    """Called with a JSON value and the path of its field; returns what the program works with.
    Raises RequestError, naming the field."""
    schema: Schema


def wrong(what: str, must: str, value: Any, *, param: str | None) -> RequestError:
    """The error of a value that is not of its kind."""
    return RequestError(f"{what} must be {must}, got {value!r:.80}", param=param)


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" in [{low}, {high}]"
    return "" if low is None else f" >= {low}"


def _limits(schema: Schema, **limits: float | None) -> Schema:
    return schema | {name: limit for name, limit in limits.items() if limit is not None}


def boolean() -> Kind:
    """``true`` or ``false``."""
    name = "true or false"

    def read(value: Any, path: str) -> bool:
        if not isinstance(value, bool):
            raise wrong(path, name, value, param=path)
        return value

    return Kind(name, read, {"type": "boolean"})


def integer(low: int | None = None, high: int | None = None) -> Kind:
    """A whole number, ends included; 3.0 is one, as in JSON schema."""
    name = f"an integer{_range(low, high)}"

    def read(value: Any, path: str) -> int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        fits = whole and not isinstance(value, bool)
        if not fits or (low is not None and value < low) or (high is not None and value > high):
            raise wrong(path, name, value, param=path)
        return int(value)

    return Kind(name, read, _limits({"type": "integer"}, minimum=low, maximum=high))


def number(low: float, high: float) -> Kind:
    """A finite number, ends included."""
    name = f"a number{_range(low, high)}"

    def read(value: Any, path: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or not math.isfinite(value):
            raise wrong(path, name, value, param=path)
        return float(value)

    return Kind(name, read, {"type": "number", "minimum": low, "maximum": high})


def text(pattern: str | None = None, *, least: int = 0) -> Kind:
    """A text.

    Args:
        pattern: What the whole of it must match.
        least: Characters it must have.
    """
    name = f"a text that matches {pattern}" if pattern else "a non-empty text" if least else "text"
    compiled = None if pattern is None else re.compile(pattern)
    schema: Schema = {"type": "string"}
    if pattern is not None:
        schema["pattern"] = f"^{pattern}$"
    if least:
        schema["minLength"] = least

    def read(value: Any, path: str) -> str:
        fits = isinstance(value, str) and len(value) >= least
        if not fits or (compiled is not None and compiled.fullmatch(value) is None):
            raise wrong(path, name, value, param=path)
        return str(value)

    return Kind(name, read, schema)


def one_of(*choices: str) -> Kind:
    """One of some texts."""
    name = f"one of {', '.join(choices)}"

    def read(value: Any, path: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise wrong(path, name, value, param=path)
        return value

    return Kind(name, read, {"type": "string", "enum": list(choices)})


def array(of: Kind, *, least: int = 0, most: int | None = None) -> Kind:
    """A list of values of one kind."""
    some = "a non-empty list" if least else "a list"
    name = f"{some} (each {of.name})" if most is None else f"a list of {least} to {most} items"

    def read(value: Any, path: str) -> list[Any]:
        fits = isinstance(value, list) and len(value) >= least
        if not fits or (most is not None and len(value) > most):
            raise wrong(path, name, value, param=path)
        return [of.read(item, f"{path}[{index}]") for index, item in enumerate(value)]

    schema = {"type": "array", "items": of.schema}
    return Kind(name, read, _limits(schema, minItems=least or None, maxItems=most))


def any_object() -> Kind:
    """An object with any fields."""
    name = "an object"

    def read(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(path, name, value, param=path)
        return value

    return Kind(name, read, {"type": "object"})


def mapping(of: Kind, key_pattern: str | None = None) -> Kind:
    """An object whose values are of one kind.

    Args:
        of: The kind.
        key_pattern: What every key must match.
    """
    name = f"an object (each value {of.name})"
    compiled = None if key_pattern is None else re.compile(key_pattern)
    schema: Schema = {"type": "object", "additionalProperties": of.schema}
    if key_pattern is not None:
        schema["propertyNames"] = {"pattern": f"^{key_pattern}$"}

    def read(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(path, name, value, param=path)
        for key in value:
            if compiled is not None and compiled.fullmatch(key) is None:
                raise wrong(path, f"an object with keys that match {key_pattern}", key, param=path)
        return {key: of.read(item, f"{path}.{key}") for key, item in value.items()}

    return Kind(name, read, schema)


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int, float),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


def _admits(kind: Kind, value: Any) -> bool:
    """Whether a value has the type of a kind, and its first item that of the kind's items."""
    if isinstance(value, bool) and kind.schema["type"] != "boolean":
        return False
    if not isinstance(value, _TYPES[kind.schema["type"]]):
        return False
    items = kind.schema.get("items")
    if not isinstance(value, list) or not value or items is None or "type" not in items:
        return True
    first = value[0]
    return isinstance(first, _TYPES[items["type"]]) and not isinstance(first, bool)


def either(*kinds: Kind, name: str) -> Kind:
    """One of several kinds, told apart by the type of the value and of its first item.

    Args:
        *kinds: The kinds; their types differ.
        name: What a value must be, in words.
    """

    def read(value: Any, path: str) -> Any:
        for kind in kinds:
            if _admits(kind, value):
                return kind.read(value, path)
        raise wrong(path, name, value, param=path)

    return Kind(name, read, {"anyOf": [kind.schema for kind in kinds]})
