"""A Python function to the JSON schema that chat templates show to a model."""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qwen_runtime.errors import RequestError

__all__ = ["tool_schema"]

_SCALARS: dict[type, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
}
_CONTAINERS: dict[type, str] = {list: "array", tuple: "array", dict: "object"}

_SECTION = r"[\n\s]*(?:{}|\Z)"
_ANY_SECTION = re.compile(r"Args:|Returns:|Raises:")
_ARGS = re.compile(r"\n\s*Args:\n(.*?)" + _SECTION.format("Returns:|Raises:"), re.DOTALL)
_RETURNS = re.compile(r"\n\s*Returns:\n\s*(.*?)" + _SECTION.format("Raises:"), re.DOTALL)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)
_ARG = re.compile(
    r"(?:^|\n)([ \t]*)(\w+):\s*"  # indentation and name
    r"(.*?)\s*"  # description, over any number of lines
    r"(?=\n(?!\1[ \t])[ \t]*\w+:|\Z)",  # up to the next name that is not indented deeper
    re.DOTALL,
)


def tool_schema(function: Any) -> dict[str, Any]:
    """Describe a function or method to a model.

    Args:
        function: Has a docstring in Google style that describes every argument, and type
            hints: str, int, float, bool, None, Any, list, tuple, dict, unions, Literal and
            Enum. ``(choices: ["a", "b"])`` at the end of a description lists what is allowed.

    Returns:
        ``{"type": "function", "function": {"name", "description", "parameters"}}``, and
        "return" if the result has a type hint.

    Raises:
        RequestError: If it is no function, or a description or type is missing or unknown.

    Source:
        ``transformers.utils.get_json_schema`` 5.23, without its image and audio types.
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise RequestError(
            "tools must hold JSON schemas (dicts) or functions with type hints and a docstring, "
            f"got {type(function).__name__}; write the schema by hand",
            param="tools",
        )
    name = function.__name__
    doc = (inspect.getdoc(function) or "").strip()
    if not doc:
        raise _error(name, "has no docstring", "describe the function and its arguments in one")
    properties, required = _parameters(function)
    returned = properties.pop("return", None)
    descriptions = _argument_descriptions(doc)
    for argument, schema in properties.items():
        if argument not in descriptions:
            raise _error(
                name,
                f"has no description of {argument!r} in its docstring",
                "add it under 'Args:'",
            )
        _describe(name, argument, schema, descriptions[argument])
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    output: dict[str, Any] = {
        "name": name,
        "description": _ANY_SECTION.split(doc, maxsplit=1)[0].strip(),
        "parameters": parameters,
    }
    if returned is not None:
        result = _RETURNS.search(doc)
        if result is not None:
            returned["description"] = result.group(1).strip()
        output["return"] = returned
    return {"type": "function", "function": output}


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the schema of each typed parameter, "return" among them, and who is required."""
    name = function.__name__
    parameters = inspect.signature(function).parameters
    receiver = next(iter(parameters), None)
    if receiver not in ("self", "cls") or _has_hint(parameters[receiver]):
        receiver = None
    required = []
    for parameter in parameters.values():
        if parameter.name == receiver:
            continue
        if not _has_hint(parameter):
            raise _error(name, f"has no type hint for {parameter.name!r}", "add one")
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError) as error:
        raise _error(
            name, f"has a type hint that means nothing ({error})", "correct it"
        ) from error
    properties = {}
    for argument, hint in hints.items():
        if argument == receiver:
            continue
        try:
            properties[argument] = _hint_schema(hint)
        except _UnknownHintError as error:
            if argument != "return":  # a model never writes what is returned
                raise _error(
                    name,
                    f"has a type hint for {argument!r} that JSON schema can't say: {error}",
                    "use basic types, or write the schema by hand",
                ) from error
    return properties, required


def _has_hint(parameter: inspect.Parameter) -> bool:
    return parameter.annotation is not inspect.Parameter.empty


def _argument_descriptions(doc: str) -> dict[str, str]:
    section = _ARGS.search(doc)
    if section is None:
        return {}
    lines = "\n".join(line for line in section.group(1).split("\n") if line.strip())
    return {
        found.group(2): re.sub(r"\s*\n+\s*", " ", found.group(3).strip())
        for found in _ARG.finditer(lines)
    }


def _describe(name: str, argument: str, schema: dict[str, Any], description: str) -> None:
    """Add a description to a schema, in place, and the choices that it ends with."""
    choices = _CHOICES.search(description)
    if choices is not None:
        try:
            listed = json.loads(choices.group(1))
        except ValueError as error:
            raise _error(
                name,
                f"lists choices of {argument!r} that are no JSON: {choices.group(1)}",
                'write them as (choices: ["a", "b"])',
            ) from error
        schema["enum"] = [item.strip() if isinstance(item, str) else item for item in listed]
        description = description[: choices.start()].strip()
    schema["description"] = description


class _UnknownHintError(Exception):
    """A type hint has no JSON schema."""


def _hint_schema(hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        return _bare_schema(hint)
    if origin in (Union, types.UnionType):
        return _union_schema(arguments)
    if origin is Literal:
        return _enum_schema(list(arguments), hint)
    if not arguments:  # typing.List and the like
        return _bare_schema(origin)
    if origin is list:
        return {"type": "array", "items": _hint_schema(arguments[0])}
    if origin is tuple:
        if len(arguments) == 1 or ... in arguments:
            raise _UnknownHintError(f"{hint} (use list[...] for any number of items)")
        return {"type": "array", "prefixItems": [_hint_schema(item) for item in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _hint_schema(arguments[1])}
    raise _UnknownHintError(str(hint))


def _bare_schema(hint: Any) -> dict[str, Any]:
    if hint is Any:
        return {}
    if isinstance(hint, type):
        if issubclass(hint, Enum):
            return _enum_schema([member.value for member in hint], hint)
        known = _SCALARS.get(hint) or _CONTAINERS.get(hint)
        if known is not None:
            return {"type": known}
    raise _UnknownHintError(str(hint))


def _enum_schema(values: list[Any], hint: Any) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise _UnknownHintError(f"{hint} (its values must be int, float, str, bool or None)")
    kinds = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union_schema(arguments: tuple[Any, ...]) -> dict[str, Any]:
    schemas = [_hint_schema(item) for item in arguments if item is not type(None)]
    union: dict[str, Any]
    if len(schemas) == 1:
        union = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        kinds = sorted({schema["type"] for schema in schemas})
        union = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:  # a list of types would lose what the members say beside their type
        union = {"anyOf": schemas}
    if type(None) in arguments:
        union["nullable"] = True
    return union


def _error(name: str, fault: str, remedy: str) -> RequestError:
    return RequestError(
        f"a function among tools must describe itself, but {name} {fault}; {remedy}",
        param="tools",
    )
