"""Clients that stream answers of a given length, and when each piece came."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from wire import Exchange

__all__ = [
    "Asked",
    "LlamaServer",
    "OurServer",
    "Stream",
    "Target",
    "Timeline",
    "inter_token_ms",
    "percentile",
    "run_clients",
    "streamed",
]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: greedy, and as long as it says."""

    prompt: list[int]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a request was sent and its tokens came, seconds on the monotonic clock."""

    sent: float
    arrivals: list[float]
    """Of each piece; a piece brings one token, or several where its reader is late."""
    num_tokens: int

    @property
    def first_token_s(self) -> float:
        """From sending to the first piece."""
        return self.arrivals[0] - self.sent


Stream = Callable[[Asked], AsyncIterator[object]]
"""Gives something for every piece of an answer, when it has come."""


class Target(Protocol):
    """A server that is measured."""

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        ...

    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        """Address and body of a streamed request."""
        ...

    def is_token(self, event: str) -> bool:
        """Whether an event brings a token; the last ones do not."""
        ...

    def count(self, event: str) -> int:
        """Tokens of the whole answer, from the event before the end."""
        ...


@dataclass(frozen=True, slots=True)
class OurServer:
    """`qwen-run serve`."""

    port: int
    end_tokens: Sequence[int] = ()
    """What a model may end with: made impossible, so that answers have their length."""

    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        """Address and body of a streamed request."""
        body: dict[str, Any] = {
            "prompt": asked.prompt,
            "max_tokens": asked.num_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.end_tokens:
            body["logit_bias"] = {str(token): -100 for token in self.end_tokens}
        return "/v1/completions", body

    def is_token(self, event: str) -> bool:
        """Whether an event brings a token; the last ones do not."""
        return '"finish_reason": null' in event

    def count(self, event: str) -> int:
        """Tokens of the whole answer, from the event before the end."""
        return int(json.loads(event)["usage"]["completion_tokens"])


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """llama.cpp's llama-server."""

    port: int

    def request(self, asked: Asked) -> tuple[str, dict[str, Any]]:
        """Address and body of a streamed request."""
        return "/completion", {
            "prompt": asked.prompt,
            "n_predict": asked.num_tokens,
            "stream": True,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }

    def is_token(self, event: str) -> bool:
        """Whether an event brings a token; the last one does not."""
        return '"stop":false' in event

    def count(self, event: str) -> int:
        """Tokens of the whole answer, from the last event."""
        return int(json.loads(event)["tokens_predicted"])


async def streamed(target: Target, asked: Asked) -> AsyncIterator[object]:
    """Stream an answer over HTTP.

    Raises:
        RuntimeError: If the answer is an error, or not as long as was asked.
    """
    path, body = target.request(asked)
    last = ""
    async with Exchange(target.port) as exchange:
        await exchange.send("POST", path, json.dumps(body).encode())
        async for event in exchange.events():
            if exchange.status != 200:
                raise RuntimeError(f"status {exchange.status}: {event}")
            if target.is_token(event):
                yield event
            elif event != "[DONE]":
                last = event
    if target.count(last) != asked.num_tokens:
        raise RuntimeError(f"asked for {asked.num_tokens} tokens, got {target.count(last)}")


async def run_clients(
    stream: Stream, asked: Sequence[Asked], num_clients: int
) -> tuple[float, list[Timeline]]:
    """Have clients send requests, each its next when it has its answer.

    Returns:
        Seconds from the first request to the last answer, and every request's timeline.
    """
    remaining = iter(asked)
    began = time.monotonic()
    each = await asyncio.gather(*(_client(stream, remaining) for _ in range(num_clients)))
    return time.monotonic() - began, [timeline for one in each for timeline in one]


async def _client(stream: Stream, remaining: Iterator[Asked]) -> list[Timeline]:
    timelines = []
    for asked in remaining:
        sent = time.monotonic()
        arrivals = [time.monotonic() async for _ in stream(asked)]
        timelines.append(Timeline(sent, arrivals, asked.num_tokens))
    return timelines


def inter_token_ms(
    timelines: Sequence[Timeline], between: tuple[float, float] | None = None
) -> list[float]:
    """Milliseconds between the pieces of every answer, those that end in a span of time."""
    start, end = between or (0.0, float("inf"))
    return [
        (after - before) * 1e3
        for timeline in timelines
        for before, after in zip(timeline.arrivals, timeline.arrivals[1:], strict=False)
        if start <= after <= end
    ]


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed; of one value, that one."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
