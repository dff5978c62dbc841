"""`response_format`: the form a caller asks an answer to have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from qwen_runtime.errors import RequestError
from qwen_runtime.structured.json_schema import schema_text

__all__ = ["ResponseFormat", "parse_response_format"]

_KEYS: Mapping[str, tuple[str, ...]] = {
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
    "regex": ("pattern",),
    "choice": ("choices",),
}
"""What each type takes beside "type"; all of it is required."""
_JSON_SCHEMA_KEYS = {"schema", "name", "description", "strict"}


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """A checked format. Equal formats compile to one grammar."""

    kind: Literal["json_schema", "regex", "choice", "tool_calls"]
    """What `source` is."""
    source: str
    """Schema as JSON, the pattern, choices as JSON, or a Lark grammar for tool calls."""


def parse_response_format(value: object) -> ResponseFormat | None:
    """Check what a caller passed as ``response_format``.

    Args:
        value: A mapping as OpenAI spells it: ``{"type": "text"}``, ``{"type": "json_object"}``
            or ``{"type": "json_schema", "json_schema": {"schema": {...}}}``, beside "schema" a
            "name", a "description" and "strict", which change nothing: a schema is always kept
            to. Beyond OpenAI: ``{"type": "regex", "pattern": ...}`` and
            ``{"type": "choice", "choices": [...]}``. Or a format that is checked already, or
            None.

    Returns:
        The format; None where the answer is free text.

    Raises:
        RequestError: If a type or key is unknown or missing, or its value is wrong.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if not isinstance(value, Mapping):
        raise _error(f'must be a mapping such as {{"type": "json_object"}}, got {value!r:.80}')
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise _error(f"type must be one of {', '.join(_KEYS)}, got {kind!r:.80}")
    _check_keys(value, {"type", *_KEYS[kind]}, set(_KEYS[kind]), f"of type {kind}")
    if kind == "json_object":
        return ResponseFormat("json_schema", '{"type": "object"}')
    if kind == "json_schema":
        return ResponseFormat("json_schema", _schema(value["json_schema"]))
    if kind == "regex":
        return ResponseFormat("regex", _text(value["pattern"], "pattern"))
    if kind == "choice":
        return ResponseFormat("choice", _choices(value["choices"]))
    return None


def _schema(value: object) -> str:
    if not isinstance(value, Mapping):
        raise _error(f'json_schema must be a mapping {{"schema": {{...}}}}, got {value!r:.80}')
    _check_keys(value, _JSON_SCHEMA_KEYS, {"schema"}, "under json_schema")
    for key in ("name", "description"):
        if value.get(key) is not None:
            _text(value[key], key)
    strict = value.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _error(f"strict must be true or false, got {strict!r:.80}")
    return schema_text(value["schema"], param="response_format")


def _choices(value: object) -> str:
    if not isinstance(value, list | tuple) or not value:
        raise _error(f"choices must be a list of at least one text, got {value!r:.80}")
    for choice in value:
        _text(choice, "every choice")
    if len(set(value)) < len(value):
        repeated = next(choice for choice in value if value.count(choice) > 1)
        raise _error(f"choices must differ, got {repeated!r:.80} twice; leave out one")
    return json.dumps(value, ensure_ascii=False)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise _error(f"{name} must be a non-empty text, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _error(
            f"{name} must be valid Unicode, but character {error.start} is half of a surrogate pair"
        ) from error
    return value


def _check_keys(value: Mapping[Any, Any], known: Set[str], required: Set[str], where: str) -> None:
    unknown = sorted(str(key) for key in value.keys() - known)
    if unknown:
        raise _error(
            f"{where} takes {', '.join(sorted(known))}, got {', '.join(unknown)}; remove that"
        )
    missing = sorted(required - value.keys())
    if missing:
        raise _error(f"{where} must have {', '.join(missing)}, got none")


def _error(fault: str) -> RequestError:
    return RequestError(f"response_format {fault}", param="response_format")
