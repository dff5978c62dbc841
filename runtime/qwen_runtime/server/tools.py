"""Tools of a chat request: who may be called, and how an answer is held to that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qwen_runtime.errors import RequestError
from qwen_runtime.server.fields import Field, Table, tagged
from qwen_runtime.server.kinds import Kind, any_object, array, boolean, either, one_of, text
from qwen_runtime.server.messages import TOOL_NAME
from qwen_runtime.structured import ResponseFormat, tool_call_format

__all__ = [
    "RESPONSE_FORMAT",
    "TOOLS",
    "TOOL_CHOICE",
    "AnswerForm",
    "answer_form",
    "check_form_size",
    "shown_tools",
]

_MAX_FORM: Final = 65_536
"""Characters of a schema, pattern or list of choices. The time to compile one grows with the
square of its length, to about 2 s here, and others' wait for it."""

_FUNCTION = Table(
    "Function",
    (
        Field("name", TOOL_NAME, "What the model calls it by.", required=True),
        Field("description", text(), "What it does."),
        Field("parameters", any_object(), "JSON schema of its arguments; none take none."),
        Field("strict", boolean(), "Keep calls to the schema, whatever the model would write."),
    ),
)
_TOOL = Table(
    "Tool",
    (
        Field("type", one_of("function"), "Tools are functions.", required=True),
        Field("function", _FUNCTION.kind(), "The function.", required=True),
    ),
)
TOOLS: Final = array(_TOOL.kind())
"""``tools`` of a request."""

_CHOSEN = Table(
    "ToolChoice",
    (
        Field("type", one_of("function"), "Tools are functions.", required=True),
        Field(
            "function",
            Table(
                "ChosenFunction", (Field("name", TOOL_NAME, "Its name.", required=True),)
            ).kind(),
            "The function to call.",
            required=True,
        ),
    ),
)
TOOL_CHOICE: Final = either(
    one_of("none", "auto", "required"),
    _CHOSEN.kind(),
    name='"none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
)
"""``tool_choice`` of a request."""


def _form(kind: str, *fields: Field) -> tuple[str, Table]:
    tag = Field("type", one_of(kind), "The form.", required=True)
    return kind, Table(f"{kind}_format", (tag, *fields))


_JSON_SCHEMA = Table(
    "JsonSchema",
    (
        Field("schema", any_object(), "What the answer keeps to.", required=True),
        Field("name", text(least=1), "Accepted; has no effect."),
        Field("description", text(least=1), "Accepted; has no effect."),
        Field("strict", boolean(), "Accepted; a schema is always kept to."),
    ),
)
RESPONSE_FORMAT: Final[Kind] = tagged(
    "type",
    (
        _form("text"),
        _form("json_object"),
        _form(
            "json_schema",
            Field("json_schema", _JSON_SCHEMA.kind(), "The schema.", required=True),
        ),
        _form("regex", Field("pattern", text(least=1), "The pattern.", required=True)),
        _form(
            "choice",
            Field("choices", array(text(least=1), least=1), "The answers.", required=True),
        ),
    ),
)
"""``response_format`` of a request."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may look like."""

    tools: tuple[dict[str, Any], ...]
    """Tools that the model is shown."""
    grammar: ResponseFormat | dict[str, Any] | None
    """What the answer is held to, for ``generate(response_format=...)``."""
    calls: bool
    """Whether tool calls are looked for in the text."""
    free_start: bool
    """Whether it may begin with anything, reasoning among it."""


def answer_form(values: Mapping[str, Any]) -> AnswerForm:
    """Settle ``tools``, ``tool_choice``, ``parallel_tool_calls`` and ``response_format``.

    Calls that must come, those of strict tools, and those of which there may be one only, are
    kept to by a grammar. Otherwise the model writes freely, and what it writes in the form of a
    call is one.

    Args:
        values: What the table of a chat request read.

    Raises:
        RequestError: If they contradict each other, or a schema cannot be kept to.
    """
    tools = shown_tools(values)
    _check_names(tools)
    choice = values["tool_choice"]
    written = values["response_format"]
    wanted = None if written is None or written["type"] == "text" else _given(written)
    if choice not in (None, "none", "auto") and not tools:
        raise RequestError(
            "tool_choice must be left out where there are no tools; add tools", param="tool_choice"
        )
    if not tools or choice == "none":
        check_form_size(wanted, "response_format")
        # A model that is not shown its tools does not call them.
        return AnswerForm((), wanted, calls=False, free_start=wanted is None)
    if wanted is not None:
        raise RequestError(
            "response_format cannot be kept to in an answer that may call tools; leave out one, "
            'or send tool_choice "none"',
            param="response_format",
        )
    parallel = values["parallel_tool_calls"] is not False
    forced = choice not in (None, "auto")
    strict = any(tool["function"].get("strict") for tool in tools)
    grammar = None
    if forced or strict or not parallel:
        check_form_size(tools, "tools")
        grammar = tool_call_format(tools, choice or "auto", parallel_tool_calls=parallel)
    return AnswerForm(tools, grammar, calls=True, free_start=not forced)


def _check_names(tools: tuple[dict[str, Any], ...]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        name = tool["function"]["name"]
        if name in seen:
            raise RequestError(
                f"tools must have a name each, got {name!r} twice; rename one",
                param=f"tools[{index}].function.name",
            )
        seen.add(name)


def check_form_size(form: object, param: str) -> None:
    """Refuse what takes too long to compile.

    Args:
        form: A response format, or tools.
        param: Its field.

    Raises:
        RequestError: If it is too large.
    """
    size = len(json.dumps(form))
    if size > _MAX_FORM:
        raise RequestError(
            f"{param} must be at most {_MAX_FORM} characters of JSON where answers are held to "
            f"it, got {size}; send less",
            param=param,
        )


def shown_tools(values: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Tools as the model sees them: templates write all they are given, so without nulls.

    Args:
        values: What a table with ``tools`` read.
    """
    return tuple(
        {"type": "function", "function": _given(tool["function"])}
        for tool in values["tools"] or ()
    )


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _given(value) if name == "json_schema" else value
        for name, value in values.items()
        if value is not None
    }
