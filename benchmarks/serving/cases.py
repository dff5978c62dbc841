"""Requests with the answers they must get: good ones from `LLM.generate`, bad ones a status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qwen_runtime import LLM, RequestOutput
from qwen_runtime.server import ServerSettings, create_app
from qwen_runtime.server.chat_request import CHAT_REQUEST, ChatRequest, read_chat_request
from qwen_runtime.server.completion_request import (
    COMPLETION_REQUEST,
    CompletionRequest,
    read_completion_request,
)
from qwen_runtime.server.service import Service
from qwen_runtime.text import parse_chat

__all__ = ["Answer", "BadRequest", "Case", "bad_requests", "good_cases"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_QUESTIONS = (
    "What is 17 + 25?",
    "What is the capital of France?",
    "Who are you?",
    "Count to ten.",
    "What is 9 * 8?",
    "Say something about the sea 🌊.",
)
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Paris"]}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice."""

    text: str
    calls: tuple[tuple[str, str], ...]
    """Name and arguments of every tool call."""
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Case:
    """A good request."""

    name: str
    path: str
    body: dict[str, Any]
    answers: tuple[Answer, ...]
    num_tokens: int
    """Tokens of all its answers."""


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A request that must be refused."""

    name: str
    method: str
    path: str
    body: bytes
    status: int
    declared_bytes: int | None = None


def good_cases(llm: LLM, max_tokens: int = 32) -> list[Case]:
    """Requests of every kind, answered by the LLM in this process.

    Args:
        llm: A small chat model.
        max_tokens: Of an answer.
    """
    service: Service = create_app(llm, ServerSettings()).state.service
    return [_case(service, llm, name, path, body) for name, path, body in _good_bodies(max_tokens)]


def bad_requests(max_context: int) -> list[BadRequest]:
    """Requests of every kind that a server has to refuse.

    Args:
        max_context: Tokens that prompt and answer may have together.
    """
    message = {"role": "user", "content": _QUESTIONS[0]}
    good = {"messages": [message]}
    wrong: dict[str, Any] = {
        "unknown field": good | {"max_new_tokens": 4},
        "wrong type": good | {"temperature": "hot"},
        "no messages": {"messages": []},
        "odd role": {"messages": [{"role": "wizard", "content": "Hi"}]},
        "too long a prompt": {"messages": [message | {"content": "word " * (max_context + 1)}]},
        "too many tokens": good | {"max_completion_tokens": 2**30},
        "negative n": good | {"n": -1},
        "contradiction": good | {"top_logprobs": 3},
        "impossible schema": good
        | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "?"}}}},
        "no number": good | {"temperature": float("nan")},
    }
    refused = [
        BadRequest(name, "POST", CHAT, json.dumps(body).encode(), 400)
        for name, body in wrong.items()
    ]
    body = json.dumps(good).encode()
    return [
        *refused,
        BadRequest("malformed", "POST", CHAT, body[:-2], 400),
        BadRequest("invalid UTF-8", "POST", CHAT, body.replace(b"17", b"\xff\xfe"), 400),
        BadRequest("deep nesting", "POST", CHAT, b"[" * 100_000, 400),
        BadRequest("other model", "POST", CHAT, json.dumps(good | {"model": "x"}).encode(), 404),
        BadRequest("no such address", "POST", "/v1/nothing", body, 404),
        BadRequest("wrong method", "GET", CHAT, b"", 405),
        BadRequest("large body", "POST", CHAT, body, 413, declared_bytes=1 << 30),
    ]


def _good_bodies(max_tokens: int) -> list[tuple[str, str, dict[str, Any]]]:
    limit = {"max_tokens": max_tokens}
    bodies: list[tuple[str, str, dict[str, Any]]] = []
    for number, question in enumerate(_QUESTIONS):
        messages = [{"role": "user", "content": question}]
        polite = [{"role": "system", "content": "You are polite."}, *messages]
        sampled = {"temperature": 0.9, "top_p": 0.95, "seed": number}
        settings: dict[str, dict[str, Any]] = {
            "greedy": {"temperature": 0},
            "sampled": sampled,
            "model's own settings": {"seed": 100 + number},
            "several choices": {**sampled, "n": 3},
            "penalties": {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.2},
            "biased, with a stop": {**sampled, "stop": ["."], "logit_bias": {"5": -100}},
            "logprobs": {"temperature": 0, "logprobs": True, "top_logprobs": 20},
        }
        bodies += [
            (name, CHAT, {"messages": messages, **limit, **more})
            for name, more in settings.items()
        ]
        bodies.append(("system message", CHAT, {"messages": polite, **limit, "temperature": 0}))
        form = {"type": "json_schema", "json_schema": {"name": "p", "schema": _PERSON}}
        bodies.append(
            (
                "JSON schema",
                CHAT,
                {"messages": messages, **limit, "response_format": form, "seed": 1},
            )
        )
        calling = {"tools": [_WEATHER], "tool_choice": "required", "seed": number}
        bodies.append(("tools", CHAT, {"messages": messages, "max_tokens": 96, **calling}))
        bodies.append(("text", COMPLETIONS, {"prompt": question, **limit, "temperature": 0}))
        ids = [[7 + number, 30, 31], [9, 40 + number]]
        bodies.append(("token ids", COMPLETIONS, {"prompt": ids, **limit, **sampled}))
    return bodies


def _case(service: Service, llm: LLM, name: str, path: str, body: dict[str, Any]) -> Case:
    asked: ChatRequest | CompletionRequest
    if path == CHAT:
        asked = read_chat_request(service, CHAT_REQUEST.read(body))
    else:
        asked = read_completion_request(service, COMPLETION_REQUEST.read(body))
    outputs = [llm.generate(call.prompt, **call.settings) for call in asked.calls]
    answers = [_answer(output, calls="tools" in body) for output in outputs]
    return Case(name, path, body, tuple(answers), sum(len(each.token_ids) for each in outputs))


def _answer(output: RequestOutput, *, calls: bool) -> Answer:
    if not calls:
        return Answer(output.text, (), output.finish_reason)
    parsed = parse_chat(output.text, reasoning=False)
    called = tuple((call.name, call.arguments) for call in parsed.tool_calls)
    reason = "tool_calls" if called and output.finish_reason == "stop" else output.finish_reason
    return Answer(parsed.content, called, reason)
