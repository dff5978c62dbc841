"""Clients of every kind: those who wait for an answer, those who leave, those who should not ask."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cases import Answer, BadRequest, Case
from wire import Exchange

__all__ = ["Visit", "Visitor"]

_SLOW_BYTES = 3
_SLOW_BUFFER_BYTES = 4096
# Kinds and how often each comes in a hundred.
_SHARES = {
    "whole": 34,
    "streamed": 33,
    "refused": 15,
    "left in the middle": 8,
    "not waited for": 7,
    "read slowly": 3,
}


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of one client."""

    kind: str
    name: str
    run: Callable[[], Awaitable[str | None]]
    """Makes it; gives what was wrong."""


class Visitor:
    """Makes requests in a seeded order, and compares what comes back.

    Args:
        port: Of the server.
        cases: Good requests with their answers.
        refusals: Bad ones.
        seed: Of the order.
    """

    def __init__(
        self, port: int, cases: Sequence[Case], refusals: Sequence[BadRequest], seed: int
    ) -> None:
        self._port = port
        self._cases = cases
        self._refusals = refusals
        self._seed = seed
        self.num_compared = 0
        """Whole answers that were compared."""
        self.num_tokens = 0
        """Tokens of these."""

    def visit(self, number: int) -> Visit:
        """The request of a number: always the same."""
        draw = random.Random(f"{self._seed}/{number}")
        (kind,) = draw.choices([*_SHARES], weights=[*_SHARES.values()])
        if kind == "refused":
            bad = draw.choice(self._refusals)
            return Visit(kind, bad.name, lambda: self._refused(bad))
        case = draw.choice(self._cases)
        patience = draw.random()
        actions: dict[str, Callable[[], Awaitable[str | None]]] = {
            "whole": lambda: self._whole(case),
            "streamed": lambda: self._streamed(case),
            "left in the middle": lambda: self._left(case, patience),
            "not waited for": lambda: self._not_waited_for(case, patience),
            "read slowly": lambda: self._streamed(case, slow=True),
        }
        return Visit(kind, case.name, actions[kind])

    async def _whole(self, case: Case) -> str | None:
        async with Exchange(self._port) as exchange:
            await exchange.send("POST", case.path, json.dumps(case.body).encode())
            document = json.loads(await exchange.body())
        if exchange.status != 200:
            return f"status {exchange.status}: {document}"
        answers = tuple(_answer(choice) for choice in document["choices"])
        return self._compare(case, answers, document["usage"]["completion_tokens"])

    async def _streamed(self, case: Case, *, slow: bool = False) -> str | None:
        received = _Received(len(case.answers))
        buffer = _SLOW_BUFFER_BYTES if slow else None
        async with Exchange(self._port, receive_buffer_bytes=buffer) as exchange:
            await exchange.send("POST", case.path, _streaming(case))
            async for data in exchange.events(slow_bytes=_SLOW_BYTES if slow else 0):
                received.add(data)
        if exchange.status != 200 or not received.done:
            return f"status {exchange.status}, the stream ended without [DONE]"
        return self._compare(case, received.answers, received.num_tokens)

    async def _left(self, case: Case, patience: float) -> str | None:
        """Leave a stream after some of its events."""
        received = _Received(len(case.answers))
        left_after = 1 + int(patience * case.num_tokens)
        async with Exchange(self._port) as exchange:
            await exchange.send("POST", case.path, _streaming(case))
            async for data in exchange.events():
                received.add(data)
                left_after -= 1
                if not left_after:
                    break
            exchange.abort()
        for had, whole in zip(received.answers, case.answers, strict=True):
            if not whole.text.startswith(had.text):
                return f"had read {had.text!r}, which does not begin {whole.text!r}"
        return None

    async def _not_waited_for(self, case: Case, patience: float) -> str | None:
        """Send a request and go: at once, or a little later."""
        async with Exchange(self._port) as exchange:
            body = json.dumps(case.body).encode()
            if patience < 0.3:  # not even the whole request
                await exchange.send("POST", case.path, body[:-5], declared_bytes=len(body))
            else:
                await exchange.send("POST", case.path, body)
                await asyncio.sleep(patience * 0.1)
            exchange.abort()
        return None

    async def _refused(self, bad: BadRequest) -> str | None:
        async with Exchange(self._port) as exchange:
            await exchange.send(bad.method, bad.path, bad.body, declared_bytes=bad.declared_bytes)
            document = json.loads(await exchange.body())
        if exchange.status != bad.status:
            return f"must have status {bad.status}, has {exchange.status}: {document}"
        message = document["error"]["message"]
        return None if message else "the error has no message"

    def _compare(
        self, case: Case, answers: Sequence[Answer], num_tokens: int | None
    ) -> str | None:
        if tuple(answers) != case.answers:
            return f"answered {tuple(answers)!r}, must be {case.answers!r}"
        if num_tokens != case.num_tokens:
            return f"says it has {num_tokens} tokens, must be {case.num_tokens}"
        self.num_compared += 1
        self.num_tokens += case.num_tokens
        return None


class _Received:
    """What a stream has brought."""

    def __init__(self, num_answers: int) -> None:
        self._texts = [""] * num_answers
        self._calls: list[dict[int, list[str]]] = [{} for _ in range(num_answers)]
        self._reasons = [""] * num_answers
        self.num_tokens: int | None = None
        self.done = False

    @property
    def answers(self) -> list[Answer]:
        parts = zip(self._texts, self._calls, self._reasons, strict=True)
        return [
            Answer(text, tuple((name, rest) for name, rest in calls.values()), reason)
            for text, calls, reason in parts
        ]

    def add(self, data: str) -> None:
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            index, delta = choice["index"], choice.get("delta", choice)
            self._texts[index] += delta.get("content") or delta.get("text") or ""
            for call in delta.get("tool_calls") or ():
                parts = self._calls[index].setdefault(call["index"], ["", ""])
                parts[0] += call["function"].get("name") or ""
                parts[1] += call["function"].get("arguments") or ""
            self._reasons[index] = choice["finish_reason"] or self._reasons[index]


def _answer(choice: dict[str, Any]) -> Answer:
    message = choice.get("message", {"content": choice.get("text")})
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = tuple((function["name"], function["arguments"]) for function in functions)
    return Answer(message["content"] or "", calls, choice["finish_reason"])


def _streaming(case: Case) -> bytes:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(case.body | options).encode()
