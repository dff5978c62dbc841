"""``/openapi.json``: the API described from the tables that read it."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from qwen_runtime.server.chat_request import CHAT_REQUEST
from qwen_runtime.server.completion_request import COMPLETION_REQUEST
from qwen_runtime.server.fields import Table
from qwen_runtime.server.kinds import Schema
from qwen_runtime.server.models import DETOKENIZE_REQUEST, TOKENIZE_REQUEST
from qwen_runtime.server.openapi_answers import ANSWERS, event_schema, reference

__all__ = ["openapi_document"]


def openapi_document(model_name: str, *, needs_key: bool) -> dict[str, Any]:
    """Describe the API (OpenAPI 3.1).

    Args:
        model_name: The served model's name.
        needs_key: Whether requests need an API key.
    """
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": f"qwen-run serve: {model_name}",
            "version": version("qwen-export"),
            "description": "A Qwen model behind an API of OpenAI's form. Unknown fields are "
            "refused by name.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _post("Answer a conversation", CHAT_REQUEST, "ChatCompletion", stream=True)
            },
            "/v1/completions": {
                "post": _post("Go on with a text", COMPLETION_REQUEST, "Completion", stream=True)
            },
            "/v1/models": {"get": _get("List the one model", "ModelList")},
            "/v1/models/{model}": {
                "get": _get("Describe the model", "Model")
                | {
                    "parameters": [
                        {
                            "name": "model",
                            "in": "path",
                            "required": True,
                            "schema": {"const": model_name},
                        }
                    ]
                }
            },
            "/tokenize": {"post": _post("Token ids of a prompt", TOKENIZE_REQUEST, "Tokens")},
            "/detokenize": {"post": _post("Text of token ids", DETOKENIZE_REQUEST, "Text")},
        },
        "components": {
            "schemas": ANSWERS
            | {
                table.name: _request(table, model_name)
                for table in (
                    *(CHAT_REQUEST, COMPLETION_REQUEST),
                    *(TOKENIZE_REQUEST, DETOKENIZE_REQUEST),
                )
            },
        },
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _request(table: Table, model_name: str) -> Schema:
    """A table's schema, with the one name that its field ``model`` may hold."""
    schema = table.schema()
    description = schema["properties"]["model"]["description"]
    named = {"enum": [model_name, None], "description": description}
    return schema | {"properties": schema["properties"] | {"model": named}}


def _post(summary: str, table: Table, answer: str, *, stream: bool = False) -> dict[str, Any]:
    operation = _get(summary, answer, (400, 404, 413, 415, 429, 503))
    body = {"required": True, "content": {"application/json": {"schema": reference(table.name)}}}
    if stream:
        events = {"schema": event_schema(answer)}
        operation["responses"]["200"]["content"]["text/event-stream"] = events
    return operation | {"requestBody": body}


def _get(summary: str, answer: str, errors: tuple[int, ...] = (404, 503)) -> dict[str, Any]:
    refused = {"application/json": {"schema": reference("Error")}}
    return {
        "summary": summary,
        "operationId": summary.lower().replace(" ", "_"),
        "responses": {
            "200": {
                "description": "Done.",
                "content": {"application/json": {"schema": reference(answer)}},
            },
            **{
                str(status): {"description": _STATUS[status], "content": refused}
                for status in (401, *errors)
            },
        },
    }


_STATUS = {
    400: "A field is wrong or unknown; the error names it.",
    401: "The API key is missing or unknown.",
    404: "There is no such model.",
    413: "The body is larger than the server takes.",
    415: "The body is not declared to be JSON.",
    429: "As many requests wait as may; try again after the time in Retry-After.",
    503: "The server is loading or stopping; try again after the time in Retry-After.",
}
