"""Messages of a chat request, in the form that chat templates are written for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from qwen_runtime.errors import RequestError
from qwen_runtime.server.fields import Field, Table, given, tagged
from qwen_runtime.server.kinds import Kind, Schema, array, either, integer, one_of, text

__all__ = ["MESSAGES", "TOOL_NAME", "template_messages"]

TOOL_NAME: Final = text(r"[A-Za-z0-9_.\-]{1,64}")
"""Names of tools: templates write them into the prompt as they are."""

_PART = Table(
    "TextPart",
    (
        Field("type", one_of("text"), "Only text is understood.", required=True),
        Field("text", text(), "The text.", required=True),
    ),
)
_TEXT = either(text(), array(_PART.kind(), least=1), name="a text or a list of text parts")

_FUNCTION = Table(
    "CalledFunction",
    (
        Field("name", TOOL_NAME, "Name of the tool.", required=True),
        Field("arguments", text(), "JSON text of an object.", required=True),
    ),
)
_TOOL_CALL = Table(
    "ToolCall",
    (
        Field("id", text(), "The call's id, which the tool's message repeats.", required=True),
        Field("type", one_of("function"), "Tools are functions.", default="function"),
        Field("function", _FUNCTION.kind(), "What was called.", required=True),
        Field("index", integer(0), "Accepted as streams have it; has no effect."),
    ),
)


def _nothing() -> Kind:
    """A field that answers of the API have and that says nothing here: null, or no items."""

    def read(value: Any, path: str) -> None:
        if value != []:
            raise RequestError(f"{path} must be null, got {value!r:.80}; leave it out", param=path)

    return Kind("null", read, {"type": "array", "maxItems": 0})


def _message(role: str, *fields: Field, rules: tuple[Schema, ...] = ()) -> tuple[str, Table]:
    named = Field("name", text(), "Passed to the chat template, which may ignore it.")
    spoken = Field("role", one_of(role), "Who speaks.", required=True)
    return role, Table(f"{role.capitalize()}Message", (spoken, *fields, named), rules=rules)


_CONTENT = Field("content", _TEXT, "Text, or parts of text, which become lines.", required=True)
MESSAGES: Final = array(
    tagged(
        "role",
        (
            _message("system", _CONTENT),
            _message("developer", _CONTENT),
            _message("user", _CONTENT),
            _message(
                "assistant",
                Field("content", _TEXT, "May be left out beside tool_calls."),
                Field("reasoning_content", text(), "What it thought before it answered."),
                Field("tool_calls", array(_TOOL_CALL.kind()), "The tools it called."),
                *(
                    Field(name, _nothing(), "Accepted as answers have it: null.")
                    for name in ("annotations", "audio", "function_call", "refusal")
                ),
                rules=(
                    {
                        "anyOf": [
                            given("content"),
                            given("tool_calls", {"type": "array", "minItems": 1}),
                        ]
                    },
                ),
            ),
            _message(
                "tool",
                _CONTENT,
                Field("tool_call_id", text(), "Which call this answers.", required=True),
            ),
        ),
    ),
    least=1,
)
"""``messages`` of a request."""


def template_messages(
    messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]], reads_tools: bool
) -> list[dict[str, Any]]:
    """Turn messages into what a chat template reads.

    "developer" becomes "system", which Qwen's templates know; arguments of calls become
    objects, as the templates write them as JSON again. For a template that does not read tools,
    they are put into the messages in the form of Qwen's own templates.

    Args:
        messages: As `MESSAGES` read them.
        tools: The tools that may be called.
        reads_tools: Whether the template writes tools and calls itself.

    Raises:
        RequestError: If an assistant's message is empty, or arguments are no JSON object.
    """
    prepared = [_prepare(index, message) for index, message in enumerate(messages)]
    return prepared if reads_tools else _spelled_out(prepared, tools)


def _prepare(index: int, message: dict[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in message.items() if value not in (None, [])}
    content = plain.get("content", "")
    plain["content"] = content if isinstance(content, str) else _joined(content)
    if plain["role"] == "developer":
        plain["role"] = "system"
    if plain["role"] == "assistant" and message["content"] is None and "tool_calls" not in plain:
        raise RequestError(
            f"messages[{index}] must have content or tool_calls, got neither; add one",
            param=f"messages[{index}].content",
        )
    if "tool_calls" in plain:
        plain["tool_calls"] = [
            _prepare_call(call, f"messages[{index}].tool_calls[{place}]")
            for place, call in enumerate(plain["tool_calls"])
        ]
    return plain


def _joined(parts: Sequence[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for part in parts)


def _prepare_call(call: dict[str, Any], path: str) -> dict[str, Any]:
    function, where = call["function"], f"{path}.function.arguments"
    try:
        arguments = json.loads(function["arguments"] or "{}", parse_constant=float)
        # Written once here, so that nothing in them can fail in a template.
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} must be JSON text, but {error}"[:300], param=where) from error
    if not isinstance(arguments, dict):
        raise RequestError(
            f"{where} must be the JSON text of an object, got {arguments!r:.80}", param=where
        )
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _spelled_out(
    messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    plain = [_call_text(message) for message in messages]
    if not tools:
        return plain
    if plain[0]["role"] == "system":
        first = plain[0] | {"content": f"{plain[0]['content']}\n\n{_tools_text(tools)}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": _tools_text(tools)}, *plain]


def _call_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = message.get("tool_calls", ())
    lines = [message["content"]] if message["content"] else []
    for call in calls:
        body = json.dumps(call["function"], ensure_ascii=False)
        lines.append(f"<tool_call>\n{body}\n</tool_call>")
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return rest | {"content": "\n".join(lines)}


def _tools_text(tools: Sequence[dict[str, Any]]) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"Their signatures are within <tools></tools> XML tags:\n<tools>\n{listed}\n</tools>\n\n"
        "For each call, return a JSON object with the function's name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
