"""``/v1/models``, ``/tokenize`` and ``/detokenize``: the model and its tokens."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen_runtime.errors import RequestError
from qwen_runtime.server.body import read_body
from qwen_runtime.server.chat_request import PROMPT_FIELDS, encode_messages
from qwen_runtime.server.fields import Field, Table, given
from qwen_runtime.server.kinds import array, boolean, integer, text
from qwen_runtime.server.messages import MESSAGES
from qwen_runtime.server.service import Service
from qwen_runtime.server.tools import shown_tools

__all__ = [
    "DETOKENIZE_REQUEST",
    "TOKENIZE_REQUEST",
    "detokenize_endpoint",
    "model_endpoint",
    "models_endpoint",
    "tokenize_endpoint",
]

_JSON: Final = "application/json"

_MODEL = Field("model", text(), "The served model's name; may be left out, as there is one.")

TOKENIZE_REQUEST: Final = Table(
    "TokenizeRequest",
    (
        Field("prompt", text(), "Text, taken as it is. This or messages."),
        Field("messages", MESSAGES, "A conversation. This or prompt."),
        *(field for field in PROMPT_FIELDS if field.name != "messages"),
        Field("return_token_strs", boolean(), "Send each token's text too.", default=False),
        _MODEL,
    ),
    rules=({"oneOf": [given("prompt"), given("messages")]},),
)
"""The body of ``POST /tokenize``."""

DETOKENIZE_REQUEST: Final = Table(
    "DetokenizeRequest",
    (
        Field("tokens", array(integer(0, 2**31 - 1)), "Token ids.", required=True),
        _MODEL,
    ),
)
"""The body of ``POST /detokenize``."""


async def models_endpoint(request: Request) -> Response:
    """List the one model."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def model_endpoint(request: Request) -> Response:
    """Describe the model."""
    service: Service = request.app.state.service
    service.check_model(request.path_params["model"])
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "qwen-export",
    }


async def tokenize_endpoint(request: Request) -> Response:
    """Turn a text or a conversation into token ids, as a completion would."""
    service: Service = request.app.state.service
    tokenize = partial(_tokenize, service)
    return Response(await read_body(request, TOKENIZE_REQUEST, tokenize), media_type=_JSON)


async def detokenize_endpoint(request: Request) -> Response:
    """Turn token ids into text."""
    service: Service = request.app.state.service
    detokenize = partial(_detokenize, service)
    return Response(await read_body(request, DETOKENIZE_REQUEST, detokenize), media_type=_JSON)


def _tokenize(service: Service, values: dict[str, Any]) -> bytes:
    service.check_model(values["model"])
    prompt, messages = values["prompt"], values["messages"]
    if (prompt is None) == (messages is None):
        raise RequestError("send either prompt or messages", param="prompt")
    tools = shown_tools(values)
    if messages is not None:
        tokens = encode_messages(service, values, tools)
    elif tools or values["chat_template_kwargs"]:
        raise RequestError(
            "tools and chat_template_kwargs only work with messages, got a prompt; leave them out",
            param="prompt",
        )
    else:
        # An empty text is no prompt, but it has tokens: none.
        tokens = service.encode(prompt) if prompt else []
    document: dict[str, Any] = {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": service.max_context,
    }
    if values["return_token_strs"]:
        raw = (service.tokenizer.token_bytes(token) for token in tokens)
        document["token_strs"] = [token.decode("utf-8", "replace") for token in raw]
    return json.dumps(document, ensure_ascii=False).encode()


def _detokenize(service: Service, values: dict[str, Any]) -> bytes:
    service.check_model(values["model"])
    tokens = values["tokens"]
    if tokens and max(tokens) >= service.vocab_size:
        raise RequestError(
            f"tokens must be ids below {service.vocab_size} (the vocabulary), got {max(tokens)}",
            param="tokens",
        )
    document = {"prompt": service.tokenizer.decode(tokens)}
    return json.dumps(document, ensure_ascii=False).encode()
