"""A request for chat completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from qwen_runtime.errors import RequestError
from qwen_runtime.server.choices import Call
from qwen_runtime.server.fields import Field, Table, given, together
from qwen_runtime.server.kinds import any_object, boolean, integer
from qwen_runtime.server.messages import MESSAGES, template_messages
from qwen_runtime.server.service import Service
from qwen_runtime.server.shared_fields import (
    HINTS,
    SHARED_FIELDS,
    SHARED_RULES,
    check_stream_options,
    choice_seeds,
    generation_settings,
    token_limit,
)
from qwen_runtime.server.tools import (
    RESPONSE_FORMAT,
    TOOL_CHOICE,
    TOOLS,
    AnswerForm,
    answer_form,
)

__all__ = ["CHAT_REQUEST", "PROMPT_FIELDS", "ChatRequest", "encode_messages", "read_chat_request"]

_RESERVED = frozenset({"messages", "self", "tools"})

PROMPT_FIELDS: Final = (
    Field("messages", MESSAGES, "The conversation.", required=True),
    Field("tools", TOOLS, "Functions that the model may call."),
    Field("chat_template_kwargs", any_object(), "Variables for the chat template."),
)
"""What a prompt is made from."""

CHAT_REQUEST: Final = Table(
    "CreateChatCompletionRequest",
    (
        *PROMPT_FIELDS,
        Field(
            "max_completion_tokens",
            integer(1, 2**31 - 1),
            "Tokens of the answer at most; as many as fit where it is left out.",
        ),
        Field("max_tokens", integer(1, 2**31 - 1), "The older name of max_completion_tokens."),
        Field("tool_choice", TOOL_CHOICE, '"auto" where there are tools.'),
        Field("parallel_tool_calls", boolean(), "Whether an answer may hold several calls."),
        Field("response_format", RESPONSE_FORMAT, "The form that the answer is held to."),
        Field("logprobs", boolean(), "Send the log-probability of every token.", default=False),
        Field("top_logprobs", integer(0, 20), "Send this many alternatives; needs logprobs."),
        *SHARED_FIELDS,
    ),
    HINTS,
    (
        *SHARED_RULES,
        together("top_logprobs", given("logprobs", {"const": True})),
    ),
)
"""The body of ``POST /v1/chat/completions``."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request."""

    calls: list[Call]
    """One for every choice."""
    form: AnswerForm
    """What the answers may look like."""
    reasoning: bool
    """Whether reasoning is looked for."""
    starts_in_reasoning: bool
    """Whether the prompt has opened it."""
    logprobs: bool
    stream: bool
    include_usage: bool


def read_chat_request(service: Service, values: dict[str, Any]) -> ChatRequest:
    """Check a request as a whole and prepare what is generated from it.

    Args:
        service: The model.
        values: What `CHAT_REQUEST` read.

    Raises:
        RequestError: Naming the field at fault.
        ApiError: 404 for another model.
    """
    service.check_model(values["model"])
    include_usage = check_stream_options(values)
    form = answer_form(values)
    if values["top_logprobs"] is not None and not values["logprobs"]:
        raise RequestError(
            "top_logprobs needs logprobs to be true, got it without; send both",
            param="top_logprobs",
        )
    prompt = encode_messages(service, values, form.tools)
    param, limit = _limit(values)
    defaults = service.llm.llm.generation_config
    limit = token_limit(
        limit,
        defaults.max_new_tokens,
        prompt_length=len(prompt),
        max_context=service.max_context,
        param=param,
    )
    settings = generation_settings(values, defaults, max_new_tokens=limit)
    if values["logprobs"]:
        settings |= {"logprobs": True, "top_logprobs": values["top_logprobs"] or 0}
    if form.grammar is not None:
        settings["response_format"] = form.grammar
    reasoning = form.free_start and _can_reason(service)
    opened = reasoning and service.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
    return ChatRequest(
        calls=[Call(prompt, settings | seed) for seed in choice_seeds(values)],
        form=form,
        reasoning=reasoning,
        starts_in_reasoning=opened,
        logprobs=values["logprobs"],
        stream=values["stream"],
        include_usage=include_usage,
    )


def encode_messages(
    service: Service, values: dict[str, Any], tools: tuple[dict[str, Any], ...]
) -> list[int]:
    """Token ids of a conversation.

    Args:
        service: The model.
        values: What `PROMPT_FIELDS` read.
        tools: Tools to show to the model.

    Raises:
        RequestError: If the bundle has no chat template, or it refuses the messages.
    """
    template = service.llm.llm.chat_template
    reads_tools = template is not None and any(
        "tools" in written for written in template.templates.values()
    )
    messages = template_messages(values["messages"], tools=tools, reads_tools=reads_tools)
    variables = values["chat_template_kwargs"] or {}
    reserved = sorted(_RESERVED & variables.keys())
    if reserved:
        raise RequestError(
            f"chat_template_kwargs must not hold {reserved[0]}; send it as a field of its own",
            param="chat_template_kwargs",
        )
    return service.encode(
        messages,
        tools=list(tools) if tools and reads_tools else None,
        chat_template_kwargs=variables,
    )


def _limit(values: dict[str, Any]) -> tuple[str, int | None]:
    """The name and value of the limit that was asked for."""
    limits = {name: values[name] for name in ("max_completion_tokens", "max_tokens")}
    newer, older = limits.values()
    if None not in (newer, older) and newer != older:
        raise RequestError(
            f"max_tokens is the older name of max_completion_tokens, got {older} and {newer}; "
            "send one of them",
            param="max_tokens",
        )
    return next(((name, limit) for name, limit in limits.items() if limit is not None), ("", None))


def _can_reason(service: Service) -> bool:
    """Whether the model was trained to think: its template knows the tags."""
    template = service.llm.llm.chat_template
    return template is not None and any(
        "<think>" in written or "</think>" in written for written in template.templates.values()
    )
