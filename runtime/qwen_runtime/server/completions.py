"""``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen_runtime.server.body import read_body
from qwen_runtime.server.choices import Choices
from qwen_runtime.server.completion_request import (
    COMPLETION_REQUEST,
    CompletionRequest,
    read_completion_request,
)
from qwen_runtime.server.logprobs import LegacyLogprobs
from qwen_runtime.server.middleware import annotate
from qwen_runtime.server.service import Service, usage
from qwen_runtime.server.sse import EventStream, while_connected

__all__ = ["completion_endpoint"]


async def completion_endpoint(request: Request) -> Response:
    """Go on with texts, whole or as a stream."""
    service: Service = request.app.state.service
    asked = await read_body(request, COMPLETION_REQUEST, partial(read_completion_request, service))
    choices = await Choices.start(service.llm, service.metrics, asked.calls)
    answer = _Completion(service, asked, choices)
    if asked.stream:
        return EventStream(answer.events(), answer.counts)
    document = await while_connected(request.receive, answer.document())
    annotate(request.scope, **answer.counts())
    return JSONResponse(document)


class _Completion:
    """The answer to one request, running from the start."""

    def __init__(self, service: Service, asked: CompletionRequest, choices: Choices) -> None:
        self._service = service
        self._asked = asked
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._choices = choices

    async def document(self) -> dict[str, Any]:
        """The whole answer."""
        outputs = await self._choices.finish()
        choices = [
            {
                "index": index,
                "text": self._asked.echoes[index] + output.text,
                "logprobs": self._writer(index).take(output.logprobs or [])
                if self._asked.logprobs
                else None,
                "finish_reason": output.finish_reason,
            }
            for index, output in enumerate(outputs)
        ]
        return self._frame(choices) | {"usage": self._usage()}

    def counts(self) -> dict[str, int]:
        """Tokens, for the log."""
        return {name: self._usage()[name] for name in ("prompt_tokens", "completion_tokens")}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as chunks."""
        unsent = list(self._asked.echoes)
        writers = [self._writer(index) for index in range(len(unsent))]
        async with aclosing(self._choices.pieces()) as pieces:
            async for index, chunk in ((piece.index, piece.chunk) async for piece in pieces):
                text = unsent[index] + (chunk.text if chunk is not None else "")
                logprobs = writers[index].take(chunk.logprobs if chunk is not None else ())
                has_logprobs = bool(logprobs["tokens"])
                if not text and not has_logprobs and chunk is not None:
                    continue
                unsent[index] = ""
                ended = self._choices.output(index).finish_reason if chunk is None else None
                choice = {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs if has_logprobs else None,
                    "finish_reason": ended,
                }
                yield self._chunk([choice])
        if self._asked.include_usage:
            yield self._chunk([]) | {"usage": self._usage()}

    def _writer(self, index: int) -> LegacyLogprobs:
        service = self._service
        offset = len(self._asked.echoes[index])
        return LegacyLogprobs(service.tokenizer, service.end_tokens, offset)

    def _usage(self) -> dict[str, Any]:
        return usage(self._choices.outputs, self._asked.choices_per_prompt)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._frame(choices)
        return chunk | {"usage": None} if self._asked.include_usage else chunk

    def _frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_name,
            "system_fingerprint": self._service.fingerprint,
            "choices": choices,
        }
