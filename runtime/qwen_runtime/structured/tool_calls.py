"""A response format that makes an answer call tools in Qwen's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_runtime.errors import RequestError
from qwen_runtime.structured.grammar import JSON_OPTIONS, lark_string
from qwen_runtime.structured.json_schema import schema_text
from qwen_runtime.structured.response_format import ResponseFormat
from qwen_runtime.text import tool_schema

__all__ = ["tool_call_format"]

_COMBINING = frozenset({"$ref", "allOf", "anyOf", "oneOf", "patternProperties"})


def tool_call_format(
    tools: Sequence[Any], tool_choice: object = "auto", *, parallel_tool_calls: bool = True
) -> ResponseFormat | None:
    r"""Turn tools into a format for `GrammarCompiler`.

    A call is ``<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>``, as Qwen writes it
    and `qwen_runtime.text.ChatParser` reads it. Its arguments keep to the tool's parameters; of
    an object of properties that says nothing about others, no others are allowed.

    Args:
        tools: ``{"type": "function", "function": {"name", "description", "parameters",
            "strict"}}`` as OpenAI spells them, or functions; see `qwen_runtime.text.tool_schema`.
        tool_choice: "auto": free text that may end in calls; "required": calls only; "none";
            or ``{"type": "function", "function": {"name": ...}}``: one call of that tool.
        parallel_tool_calls: Whether an answer may hold several calls.

    Returns:
        The format; None for "none".

    Raises:
        RequestError: If a tool or the choice is wrong, or parameters have a schema that cannot
            be kept to.
    """
    functions = _functions(tools)
    if not isinstance(parallel_tool_calls, bool):
        raise RequestError(
            f"parallel_tool_calls must be true or false, got {parallel_tool_calls!r:.80}",
            param="parallel_tool_calls",
        )
    if tool_choice == "none":
        return None
    if tool_choice in ("auto", "required"):
        more = ' ("\\n" "<tool_call>" call)*' if parallel_tool_calls else ""
    else:
        name = _chosen(tool_choice, functions)
        functions = {name: functions[name]}
        more = ""
    calls = " | ".join(
        f"{lark_string(_opening(name))} arguments_{index}" for index, name in enumerate(functions)
    )
    if tool_choice == "auto":
        # The opening tag ends the text as soon as it is complete.
        start = f'start: TEXT | opening call{more}\nopening[lazy]: TEXT "<tool_call>"\n'
        start += "TEXT: /(.|\\n)*/\n"
    else:
        start = f'start: "<tool_call>" call{more}\n'
    closing = lark_string("}\n</tool_call>")
    arguments = "".join(
        f"arguments_{index}: %json {schema}\n" for index, schema in enumerate(functions.values())
    )
    return ResponseFormat("tool_calls", f"{start}call: ({calls}) {closing}\n{arguments}")


def _opening(name: str) -> str:
    return f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '


def _functions(tools: object) -> dict[str, str]:
    """The schema of each tool's arguments by the tool's name."""
    if not isinstance(tools, list | tuple) or not tools:
        raise _error("tools", f"must be a list of at least one tool, got {tools!r:.80}")
    functions: dict[str, str] = {}
    for tool in tools:
        if isinstance(tool, Mapping):
            function = _described(tool)
        else:
            function = tool_schema(tool)["function"]
            function["parameters"] = _without_nullable(function["parameters"])
        name = function["name"]
        if name in functions:
            raise _error("tools", f"must differ in name, got {name!r} twice; leave out one")
        functions[name] = _arguments(function.get("parameters"))
    return functions


def _described(tool: Mapping[Any, Any]) -> Mapping[Any, Any]:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise _error(
            "tools",
            f'must hold functions {{"type": "function", "function": {{...}}}}, got {tool!r:.80}',
        )
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _error("tools", f"must have a name each, a non-empty text, got {name!r:.80}")
    return function


def _arguments(parameters: object) -> str:
    # As in OpenAI's API, a tool without parameters takes none.
    schema = {"type": "object", "properties": {}} if parameters is None else parameters
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        raise _error(
            "tools",
            'must have parameters {"type": "object", "properties": {...}}, as a call has named '
            f"arguments, got {parameters!r:.80}",
        )
    closed = dict(schema)
    if not _COMBINING & closed.keys() and "properties" in closed:
        closed.setdefault("additionalProperties", False)
    options = {"x-guidance": dict(JSON_OPTIONS)}
    return json.dumps(options | json.loads(schema_text(closed, param="tools")))


def _without_nullable(schema: Any) -> Any:
    """A described function's schema with ``nullable``, which templates show, in JSON schema."""
    if isinstance(schema, list):
        return [_without_nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: _without_nullable(value) for key, value in schema.items() if key != "nullable"}
    if schema.get("nullable") is True:
        return {"anyOf": [plain, {"type": "null"}]}
    return plain


def _chosen(tool_choice: object, functions: Mapping[str, str]) -> str:
    wanted = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    name = wanted.get("name") if isinstance(wanted, Mapping) else None
    if not isinstance(tool_choice, Mapping) or tool_choice.get("type") != "function" or not name:
        raise _error(
            "tool_choice",
            'must be "auto", "required", "none" or {"type": "function", "function": {"name": '
            f"...}}}}, got {tool_choice!r:.80}",
        )
    if name not in functions:
        raise _error("tool_choice", f"must name one of {', '.join(functions)}, got {name!r:.80}")
    return str(name)


def _error(param: str, fault: str) -> RequestError:
    return RequestError(f"{param} {fault}", param=param)
