"""Checks of a JSON schema that come before it is compiled.

The compiler ignores keywords it does not know and accepts recursion without end; both are refused
here, so that what was asked for is either kept to or an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from qwen_runtime.errors import RequestError

__all__ = ["schema_text"]

MAX_DEPTH = 64
"""Nested schemas allowed; the compiler's JSON reader ends at 128 levels of any kind."""

_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_MAPS = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_SCHEMAS = frozenset({"additionalItems", "additionalProperties", "items"})
_ENFORCED = frozenset(
    {
        *("$ref", "const", "enum", "format", "pattern", "required", "type"),
        *("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum", "multipleOf"),
        *("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"),
    }
)
_ANNOTATIONS = frozenset(
    {
        *("$comment", "$id", "$schema", "default", "deprecated", "description"),
        *("examples", "readOnly", "title", "writeOnly"),
    }
)
_KNOWN = _LISTS | _MAPS | _SCHEMAS | _ENFORCED | _ANNOTATIONS


def schema_text(schema: object, *, param: str) -> str:
    """Check a schema and write it as JSON.

    Args:
        schema: A JSON schema, a mapping.
        param: Argument to name in an error.

    Returns:
        The schema as JSON, its keys in the given order: properties are generated in it.

    Raises:
        RequestError: If it is not JSON, is nested too deeply, has a keyword that is unknown or
            cannot be enforced, or refers to itself without an end.
    """
    if not isinstance(schema, Mapping):
        raise RequestError(
            f"{param}: a JSON schema must be a mapping, got {schema!r:.80}", param=param
        )
    try:
        text = json.dumps(schema, allow_nan=False, default=_plain)
        plain = json.loads(text)
        text.encode()
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{param}: a JSON schema must hold JSON values, but {error}; write it as JSON",
            param=param,
        ) from error
    except RecursionError as error:
        raise _too_deep("#", param) from error
    references: dict[str, str] = {}
    for place, node in _nodes(plain, "#", 0, param):
        _check_node(place, node, param)
        if isinstance(node, dict) and isinstance(node.get("$ref"), str):
            references.setdefault(node["$ref"], place)
    _check_recursion(plain, references, param)
    return text


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r:.80} is no JSON value")


def _nodes(schema: Any, place: str, depth: int, param: str) -> Iterator[tuple[str, Any]]:
    """Every schema within a schema, with its place as a JSON pointer."""
    if depth > MAX_DEPTH:
        raise _too_deep(place, param)
    yield place, schema
    if not isinstance(schema, dict):
        return
    for keyword, value in schema.items():
        at = f"{place}/{keyword}"
        inner: list[tuple[str, Any]] = []
        if keyword in _MAPS and isinstance(value, dict):
            inner = [(f"{at}/{name}", item) for name, item in value.items()]
        elif keyword in _LISTS | {"items"} and isinstance(value, list):
            inner = [(f"{at}/{index}", item) for index, item in enumerate(value)]
        elif keyword in _SCHEMAS:
            inner = [(at, value)]
        for name, item in inner:
            yield from _nodes(item, name, depth + 1, param)


def _check_node(place: str, schema: Any, param: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise RequestError(
            f"{param}: a JSON schema must be a mapping or true or false, got {schema!r:.80} at "
            f"{place}",
            param=param,
        )
    unknown = [keyword for keyword in schema if keyword not in _KNOWN]
    if "nullable" in unknown:
        raise RequestError(
            f"{param}: nullable at {place} is no JSON schema keyword; write "
            '{"anyOf": [..., {"type": "null"}]}',
            param=param,
        )
    if unknown:
        raise RequestError(
            f"{param}: the schema keyword {unknown[0]!r} at {place} is unknown or cannot be "
            "enforced; remove it",
            param=param,
        )


def _check_recursion(root: Any, references: Mapping[str, str], param: str) -> None:
    """Refuse references whose values would contain themselves for ever."""
    targets = {reference: _resolve(root, reference) for reference in references}
    # Least fixed point: a target ends once some value of it needs only targets that end.
    ending = {reference for reference, target in targets.items() if target is None}
    while True:
        found = {r for r in targets.keys() - ending if _ends(targets[r], ending)}
        if not found:
            break
        ending |= found
    endless = [reference for reference in references if reference not in ending]
    if endless:
        raise RequestError(
            f"{param}: the schema {endless[0]!r}, used at {references[endless[0]]}, contains "
            "itself without an end; make a property optional, or allow an empty array or null",
            param=param,
        )


def _ends(schema: Any, ending: set[str]) -> bool:
    """Whether some value of a schema is finite, as far as is known."""
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return True
    parts = [_ends(item, ending) for item in _items(schema, "allOf")]
    if isinstance(schema.get("$ref"), str):
        parts.append(schema["$ref"] in ending)
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            parts.append(any(_ends(item, ending) for item in _items(schema, keyword)))
    return all(parts) and any(_kind_ends(schema, kind, ending) for kind in _kinds(schema))


def _kinds(schema: dict[str, Any]) -> list[Any]:
    kinds = schema.get("type", "null")  # without a type, null is among the values
    return kinds if isinstance(kinds, list) else [kinds]


def _kind_ends(schema: dict[str, Any], kind: Any, ending: set[str]) -> bool:
    if kind == "object":
        properties = schema.get("properties")
        known = properties if isinstance(properties, dict) else {}
        other = schema.get("additionalProperties", True)
        return all(_ends(known.get(name, other), ending) for name in _items(schema, "required"))
    if kind == "array" and schema.get("minItems"):
        first = _items(schema, "prefixItems")
        rest = schema.get("items", True)
        few = first[: schema["minItems"]] if isinstance(schema["minItems"], int) else first
        return all(_ends(item, ending) for item in [*few, rest][: max(1, len(few))])
    return True


def _items(schema: dict[str, Any], keyword: str) -> list[Any]:
    value = schema.get(keyword)
    return value if isinstance(value, list) else []


def _resolve(root: Any, reference: str) -> Any:
    """The schema a local reference names; None where the compiler has to decide."""
    if not reference.startswith("#"):
        return None
    node = root
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        else:
            return None
    return node


def _too_deep(place: str, param: str) -> RequestError:
    return RequestError(
        f"{param}: schemas may be nested {MAX_DEPTH} levels deep, but {place:.80} is deeper; "
        "flatten it, or use $ref",
        param=param,
    )
