"""Schemas of what the API answers."""

from __future__ import annotations

from functools import partial
from typing import Final

from qwen_runtime.server.kinds import Schema

__all__ = ["ANSWERS", "event_schema", "reference"]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}


def _object(_optional: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in _optional],
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _constant(value: str) -> Schema:
    return {"const": value}


def reference(name: str) -> Schema:
    """A schema that stands under its name among the document's."""
    return {"$ref": f"#/components/schemas/{name}"}


_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_TOKEN = partial(
    _object,
    token=_TEXT,
    logprob={"type": "number"},
    bytes=_list({"type": "integer", "minimum": 0, "maximum": 255}),
)
_CALL = _object(
    id=_TEXT, type=_constant("function"), function=_object(name=_TEXT, arguments=_TEXT)
)
ANSWERS: Final[dict[str, Schema]] = {
    "Error": _object(
        error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code=_or_null(_TEXT))
    ),
    "Usage": _object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
    ),
    "ChatLogprobs": _object(
        content=_list(_TOKEN(top_logprobs=_list(_TOKEN()))), refusal={"type": "null"}
    ),
    "ChatMessage": _object(
        ("reasoning_content", "tool_calls"),
        role=_constant("assistant"),
        content=_or_null(_TEXT),
        refusal={"type": "null"},
        reasoning_content=_TEXT,
        tool_calls=_list(_CALL),
    ),
    "ChatDelta": _object(
        ("role", "content", "reasoning_content", "tool_calls"),
        role=_constant("assistant"),
        content=_TEXT,
        reasoning_content=_TEXT,
        tool_calls=_list(
            _object(
                index=_COUNT,
                id=_TEXT,
                type=_constant("function"),
                function=_object(name=_TEXT, arguments=_TEXT),
            )
        ),
    ),
    "ChatCompletionChunk": _object(
        ("usage",),
        id=_TEXT,
        object=_constant("chat.completion.chunk"),
        created=_COUNT,
        model=_TEXT,
        system_fingerprint=_TEXT,
        choices=_list(
            _object(
                ("logprobs",),
                index=_COUNT,
                delta=reference("ChatDelta"),
                logprobs=reference("ChatLogprobs"),
                finish_reason=_or_null(_FINISH),
            )
        ),
        usage=_or_null(reference("Usage")),
    ),
    "ChatCompletion": _object(
        id=_TEXT,
        object=_constant("chat.completion"),
        created=_COUNT,
        model=_TEXT,
        system_fingerprint=_TEXT,
        choices=_list(
            _object(
                index=_COUNT,
                message=reference("ChatMessage"),
                logprobs=_or_null(reference("ChatLogprobs")),
                finish_reason=_FINISH,
            )
        ),
        usage=reference("Usage"),
    ),
    "CompletionLogprobs": _object(
        text_offset=_list(_COUNT),
        token_logprobs=_NUMBERS,
        tokens=_list(_TEXT),
        top_logprobs=_list({"type": "object", "additionalProperties": {"type": "number"}}),
    ),
    "Completion": _object(
        id=_TEXT,
        object=_constant("text_completion"),
        created=_COUNT,
        model=_TEXT,
        system_fingerprint=_TEXT,
        choices=_list(
            _object(
                index=_COUNT,
                text=_TEXT,
                logprobs=_or_null(reference("CompletionLogprobs")),
                finish_reason=_FINISH,
            )
        ),
        usage=reference("Usage"),
    ),
    "CompletionChunk": _object(
        ("usage",),
        id=_TEXT,
        object=_constant("text_completion"),
        created=_COUNT,
        model=_TEXT,
        system_fingerprint=_TEXT,
        choices=_list(
            _object(
                index=_COUNT,
                text=_TEXT,
                logprobs=_or_null(reference("CompletionLogprobs")),
                finish_reason=_or_null(_FINISH),
            )
        ),
        usage=_or_null(reference("Usage")),
    ),
    "Model": _object(id=_TEXT, object=_constant("model"), created=_COUNT, owned_by=_TEXT),
    "ModelList": _object(object=_constant("list"), data=_list(reference("Model"))),
    "Tokens": _object(
        ("token_strs",),
        tokens=_list(_COUNT),
        count=_COUNT,
        max_model_len=_COUNT,
        token_strs=_list(_TEXT),
    ),
    "Text": _object(prompt=_TEXT),
}
"""Schemas by name."""


def event_schema(answer: str) -> Schema:
    """The schema of one event of a stream: a chunk, an error, or the end.

    Args:
        answer: Name of the schema of the same answer as a whole.
    """
    whole = {"anyOf": [reference(f"{answer}Chunk"), reference("Error")]}
    chunk = _TEXT | {"contentMediaType": "application/json", "contentSchema": whole}
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [_constant("[DONE]"), chunk]}},
        "required": ["data"],
    }
