"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen_runtime.outputs import RequestOutput, TokenLogprob
from qwen_runtime.server.body import read_body
from qwen_runtime.server.chat_request import CHAT_REQUEST, ChatRequest, read_chat_request
from qwen_runtime.server.choices import Choices, Piece
from qwen_runtime.server.logprobs import chat_logprobs
from qwen_runtime.server.middleware import annotate
from qwen_runtime.server.service import Service, usage
from qwen_runtime.server.sse import EventStream, while_connected
from qwen_runtime.text import (
    ChatEvent,
    ChatParser,
    ContentDelta,
    ReasoningDelta,
    ToolCall,
    parse_chat,
)

__all__ = ["chat_endpoint"]


async def chat_endpoint(request: Request) -> Response:
    """Answer a conversation, whole or as a stream."""
    service: Service = request.app.state.service
    asked = await read_body(request, CHAT_REQUEST, partial(read_chat_request, service))
    choices = await Choices.start(service.llm, service.metrics, asked.calls)
    answer = _ChatAnswer(service, asked, choices)
    if asked.stream:
        return EventStream(answer.events(), answer.counts)
    document = await while_connected(request.receive, answer.document())
    annotate(request.scope, **answer.counts())
    return JSONResponse(document)


class _ChatAnswer:
    """The answer to one request, running from the start."""

    def __init__(self, service: Service, asked: ChatRequest, choices: Choices) -> None:
        self._service = service
        self._asked = asked
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._choices = choices

    async def document(self) -> dict[str, Any]:
        """The whole answer."""
        outputs = await self._choices.finish()
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        totals = usage(outputs, len(outputs))
        return self._frame("chat.completion", choices) | {"usage": totals}

    def counts(self) -> dict[str, int]:
        """Tokens, for the log."""
        totals = usage(self._choices.outputs, len(self._asked.calls))
        return {name: totals[name] for name in ("prompt_tokens", "completion_tokens")}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as chunks."""
        writers = [_ChoiceWriter(self._parser()) for _ in self._asked.calls]
        async with aclosing(self._choices.pieces()) as pieces:
            async for piece in pieces:
                for choice in self._deltas(piece, writers[piece.index]):
                    yield self._chunk([choice])
        if self._asked.include_usage:
            totals = usage(self._choices.outputs, len(self._asked.calls))
            yield self._chunk([]) | {"usage": totals}

    def _choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        asked = self._asked
        parsed = parse_chat(
            output.text,
            reasoning=asked.reasoning,
            tools=asked.form.calls,
            starts_in_reasoning=asked.starts_in_reasoning,
        )
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if parsed.tool_calls and not parsed.content else parsed.content,
            "refusal": None,
        }
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if parsed.tool_calls:
            message["tool_calls"] = [_call(call) for call in parsed.tool_calls]
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(output.logprobs or []),
            "finish_reason": _finish_reason(output, called=bool(parsed.tool_calls)),
        }

    def _deltas(self, piece: Piece, writer: _ChoiceWriter) -> list[dict[str, Any]]:
        """What one step adds to a choice; nothing while its text is undecided."""
        choice: dict[str, Any] = {"index": piece.index, "finish_reason": None}
        chunk = piece.chunk
        if chunk is None:
            output = self._choices.output(piece.index)
            last = writer.finish()
            reason = _finish_reason(output, called=writer.called)
            ended = choice | {"delta": writer.opened({}), "finish_reason": reason}
            return [*({**choice, "delta": delta} for delta in last), ended]
        deltas = writer.push(chunk.text)
        logprobs = self._logprobs(chunk.logprobs)
        if logprobs is not None and logprobs["content"]:
            # Log-probabilities go out with their step, whatever became of its text.
            deltas = deltas or [writer.opened({"content": ""})]
            first = choice | {"delta": deltas[0], "logprobs": logprobs}
            return [first, *({**choice, "delta": delta} for delta in deltas[1:])]
        return [{**choice, "delta": delta} for delta in deltas]

    def _parser(self) -> ChatParser:
        return ChatParser(
            reasoning=self._asked.reasoning,
            tools=self._asked.form.calls,
            starts_in_reasoning=self._asked.starts_in_reasoning,
        )

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        service = self._service
        content = chat_logprobs(service.tokenizer, logprobs, service.end_tokens)
        return {"content": content, "refusal": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._frame("chat.completion.chunk", choices)
        return chunk | {"usage": None} if self._asked.include_usage else chunk

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._service.model_name,
            "system_fingerprint": self._service.fingerprint,
            "choices": choices,
        }


class _ChoiceWriter:
    """Turns the text of one choice into deltas; the first of them names the role."""

    def __init__(self, parser: ChatParser) -> None:
        self._parser = parser
        self._opened = False
        self.called = False
        """Whether there was a tool call."""

    def push(self, text: str) -> list[dict[str, Any]]:
        return [self._delta(event) for event in self._parser.push(text)]

    def finish(self) -> list[dict[str, Any]]:
        return [self._delta(event) for event in self._parser.finish()]

    def opened(self, delta: dict[str, Any]) -> dict[str, Any]:
        if self._opened:
            return delta
        self._opened = True
        return {"role": "assistant"} | delta

    def _delta(self, event: ChatEvent) -> dict[str, Any]:
        if isinstance(event, ContentDelta):
            return self.opened({"content": event.text})
        if isinstance(event, ReasoningDelta):
            return self.opened({"reasoning_content": event.text})
        self.called = True
        return self.opened({"tool_calls": [{"index": event.index} | _call(event)]})


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _finish_reason(output: RequestOutput, *, called: bool) -> str:
    return "tool_calls" if called and output.finish_reason == "stop" else output.finish_reason
