"""Clients that ask one question after the other and write down what they got."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai

KEY = "key-of-the-test"
MODEL = "tiny"
NUM_CLIENTS = 8
QUESTIONS = tuple(f"What is {a} + {b}?" for a in range(11, 19) for b in (25, 47))


@dataclass
class Load:
    """What clients saw."""

    answers: list[tuple[str, str, str]] = field(default_factory=list)
    """Question, answer, fingerprint of the bundle."""
    retried: list[openai.OpenAIError] = field(default_factory=list)
    """Errors after which a client asked again."""


@contextmanager
def load(url: str) -> Iterator[Load]:
    """Keep clients busy while the block lasts; raises what they cannot retry."""
    seen, stop = Load(), threading.Event()
    clients: list[Future[None]] = []
    try:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            clients += [
                pool.submit(_ask_on, url, index, seen, stop) for index in range(NUM_CLIENTS)
            ]
            try:
                yield seen
            finally:
                stop.set()
    finally:
        # Also where the block failed: clients that ended are why it waited in vain.
        for client in clients:
            client.result()


def ask(client: openai.OpenAI, question: str, *, stream: bool, **more: Any) -> tuple[str, str]:
    """The greedy answer to a question, and the fingerprint of the bundle that gave it."""
    answer: Any = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
        stream=stream,
        **more,
    )
    if not stream:
        return answer.choices[0].message.content, answer.system_fingerprint
    chunks = list(answer)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length"), "a stream was cut unseen"
    return text, chunks[0].system_fingerprint


def client_of(url: str, **settings: Any) -> openai.OpenAI:
    """OpenAI's client; it retries nothing by itself, so that nothing is hidden."""
    settings = {"api_key": KEY, "max_retries": 0, "timeout": 60, **settings}
    return openai.OpenAI(base_url=f"{url}/v1", **settings)


def until(done: Callable[[], bool], seconds: float) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def _ask_on(url: str, index: int, seen: Load, stop: threading.Event) -> None:
    with client_of(url) as client:
        turn = index
        while not stop.is_set():
            question = QUESTIONS[turn % len(QUESTIONS)]
            try:
                answer = ask(client, question, stream=turn % 2 == 0)
            except openai.OpenAIError as error:
                if not is_retriable(error):
                    raise
                seen.retried.append(error)
                continue
            seen.answers.append((question, *answer))
            turn += 1


def is_retriable(error: openai.OpenAIError) -> bool:
    """Whether a client may ask again: 408, 503, a broken connection, or the same in a stream.

    No answer in the client's own time is none of these: it would hide a request that hangs.
    """
    if isinstance(error, openai.APIStatusError):
        lost = error.status_code == 503 and error.code == "server_unavailable"
        return lost or error.status_code == 408  # the proxy's limit
    if isinstance(error, openai.APIConnectionError):
        return not isinstance(error, openai.APITimeoutError)
    return isinstance(error, openai.APIError) and error.code == "server_unavailable"
