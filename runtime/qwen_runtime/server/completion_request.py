"""A request for plain completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from qwen_runtime.errors import RequestError
from qwen_runtime.server.choices import Call
from qwen_runtime.server.fields import Field, Table
from qwen_runtime.server.kinds import array, boolean, either, integer, text
from qwen_runtime.server.service import Service
from qwen_runtime.server.shared_fields import (
    HINTS,
    MAX_CHOICES,
    SHARED_FIELDS,
    SHARED_RULES,
    check_stream_options,
    choice_seeds,
    generation_settings,
    token_limit,
)
from qwen_runtime.server.tools import RESPONSE_FORMAT, check_form_size

__all__ = ["COMPLETION_REQUEST", "CompletionRequest", "read_completion_request"]

_IDS = array(integer(0, 2**31 - 1), least=1)
_PROMPT = either(
    text(least=1),
    array(text(least=1), least=1, most=MAX_CHOICES),
    _IDS,
    array(_IDS, least=1, most=MAX_CHOICES),
    name="a non-empty text, a list of token ids, or a list of either",
)

COMPLETION_REQUEST: Final = Table(
    "CreateCompletionRequest",
    (
        Field("prompt", _PROMPT, "Text to go on with, its token ids, or several.", required=True),
        Field("max_tokens", integer(1, 2**31 - 1), "Tokens of an answer at most.", default=16),
        Field("echo", boolean(), "Begin each answer with its prompt.", default=False),
        Field("logprobs", integer(0, 5), "Log-probabilities, with this many alternatives."),
        Field("response_format", RESPONSE_FORMAT, "The form that an answer is held to."),
        *SHARED_FIELDS,
    ),
    HINTS,
    SHARED_RULES,
)
"""The body of ``POST /v1/completions``."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A checked request."""

    calls: list[Call]
    """One for every choice; those of one prompt one after another."""
    echoes: list[str]
    """What each choice's text begins with."""
    choices_per_prompt: int
    logprobs: bool
    stream: bool
    include_usage: bool


def read_completion_request(service: Service, values: dict[str, Any]) -> CompletionRequest:
    """Check a request as a whole and prepare what is generated from it.

    Args:
        service: The model.
        values: What `COMPLETION_REQUEST` read.

    Raises:
        RequestError: Naming the field at fault.
        ApiError: 404 for another model.
    """
    service.check_model(values["model"])
    include_usage = check_stream_options(values)
    prompts = _prompts(values["prompt"])
    if len(prompts) * values["n"] > MAX_CHOICES:
        raise RequestError(
            f"prompts times n must be at most {MAX_CHOICES}, got {len(prompts)} times "
            f"{values['n']}; send several requests",
            param="n",
        )
    if values["echo"] and values["logprobs"] is not None:
        raise RequestError(
            "echo gives no log-probabilities of the prompt, got logprobs beside it; leave out one",
            param="echo",
        )
    calls: list[Call] = []
    echoes: list[str] = []
    for prompt in prompts:
        ids = service.encode(prompt)
        _check_ids(ids, service.vocab_size)
        calls += [Call(ids, settings) for settings in _settings(service, values, len(ids))]
        echo = prompt if isinstance(prompt, str) else service.tokenizer.decode(ids)
        echoes += [echo if values["echo"] else ""] * values["n"]
    return CompletionRequest(
        calls=calls,
        echoes=echoes,
        choices_per_prompt=values["n"],
        logprobs=values["logprobs"] is not None,
        stream=values["stream"],
        include_usage=include_usage,
    )


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _check_ids(ids: list[int], vocab_size: int) -> None:
    if max(ids) >= vocab_size:
        raise RequestError(
            f"prompt must hold token ids below {vocab_size} (the vocabulary), got {max(ids)}",
            param="prompt",
        )


def _settings(
    service: Service, values: dict[str, Any], prompt_length: int
) -> list[dict[str, Any]]:
    """The settings of every choice of a prompt."""
    defaults = service.llm.llm.generation_config
    room = token_limit(
        None,
        None,
        prompt_length=prompt_length,
        max_context=service.max_context,
        param="max_tokens",
    )
    settings = generation_settings(
        values, defaults, max_new_tokens=min(values["max_tokens"], room)
    )
    if values["logprobs"] is not None:
        settings |= {"logprobs": True, "top_logprobs": values["logprobs"]}
    if values["response_format"] is not None:
        check_form_size(values["response_format"], "response_format")
        settings["response_format"] = values["response_format"]
    return [settings | seed for seed in choice_seeds(values)]
