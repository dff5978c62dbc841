"""Fields that chat and plain completions share, and what they mean to the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from qwen_runtime.errors import CapacityError, RequestError
from qwen_runtime.generation_config import GenerationConfig
from qwen_runtime.server.fields import Field, Table, given, together
from qwen_runtime.server.kinds import array, boolean, either, integer, mapping, number, text

__all__ = [
    "HINTS",
    "MAX_CHOICES",
    "SHARED_FIELDS",
    "SHARED_RULES",
    "check_stream_options",
    "choice_seeds",
    "generation_settings",
    "token_limit",
]

MAX_CHOICES: Final = 128
"""Answers to one request, OpenAI's limit for ``n``."""

_GREEDY_BELOW: Final = 1e-5
"""Temperatures below it are 0: float32 scores divided by less may overflow."""

_STREAM_OPTIONS = Table(
    "StreamOptions",
    (Field("include_usage", boolean(), "End with a chunk that holds the usage.", default=False),),
)

SHARED_FIELDS: Final = (
    Field("model", text(), "The served model's name; may be left out, as there is one."),
    Field(
        "temperature",
        number(0, 2),
        "Divides the scores; 0 is greedy decoding, where top_p, top_k and min_p do nothing. Left "
        "out, the model's own settings hold.",
    ),
    Field("top_p", number(0, 1), "Keep the most likely tokens of this mass."),
    Field("top_k", integer(-1, 2**31 - 1), "Keep the k most likely tokens; 0 and -1 keep all."),
    Field("min_p", number(0, 1), "Keep tokens this fraction as likely as the best."),
    Field(
        "repetition_penalty",
        number(0.01, 100),
        "Above 1, makes tokens of prompt and answer less likely; 1 is off.",
    ),
    Field(
        "presence_penalty", number(-2, 2), "Subtracted from the scores of tokens in the answer."
    ),
    Field(
        "frequency_penalty", number(-2, 2), "Subtracted once for every occurrence in the answer."
    ),
    Field(
        "logit_bias",
        mapping(number(-100, 100), r"(0|[1-9][0-9]{0,9})"),
        "Added to the scores of tokens, by token id.",
    ),
    Field(
        "seed",
        integer(-(2**63), 2**64 - 1),
        "Makes sampling reproducible; choice i of several is drawn with seed + i.",
    ),
    Field(
        "stop",
        either(
            text(least=1), array(text(least=1), most=64), name="a non-empty text or a list of them"
        ),
        "Texts before which an answer ends.",
    ),
    Field("n", integer(1, MAX_CHOICES), "How many answers.", default=1),
    Field("stream", boolean(), "Send the answer as server-sent events.", default=False),
    Field("stream_options", _STREAM_OPTIONS.kind(), "Only with stream."),
    Field("user", text(), "Accepted; has no effect."),
    Field("metadata", mapping(text()), "Accepted; has no effect."),
    Field("store", boolean(), "Accepted; has no effect: nothing is stored."),
    Field("service_tier", text(), "Accepted; has no effect."),
)

SHARED_RULES: Final = (together("stream_options", given("stream", {"const": True})),)
"""Rules of tables with these fields."""

HINTS: Final[Mapping[str, str]] = {
    "best_of": "send n, and choose among the answers by their logprobs",
    "function_call": "send tool_choice",
    "functions": "send tools",
    "guided_choice": 'send response_format {"type": "choice", "choices": [...]}',
    "guided_json": 'send response_format {"type": "json_schema", ...}',
    "guided_regex": 'send response_format {"type": "regex", "pattern": ...}',
    "max_new_tokens": "send max_completion_tokens",
    "suffix": "the model only goes on with a text; put what it needs into the prompt",
}
"""What to send instead of fields that other servers have."""


def check_stream_options(values: Mapping[str, Any]) -> bool:
    """Whether a stream shall end with its usage.

    Raises:
        RequestError: If options are given and there is no stream.
    """
    options = values["stream_options"]
    if options is None:
        return False
    if not values["stream"]:
        raise RequestError(
            "stream_options needs stream to be true, got it without; leave it out",
            param="stream_options",
        )
    return bool(options["include_usage"])


def choice_seeds(values: Mapping[str, Any]) -> list[dict[str, int]]:
    """The seed of every choice, as settings; none where none was asked for."""
    seed = values["seed"]
    if seed is None:
        return [{}] * values["n"]
    return [{"seed": (seed + index) % 2**64} for index in range(values["n"])]


def token_limit(
    requested: int | None,
    default: int | None,
    *,
    prompt_length: int,
    max_context: int,
    param: str,
) -> int:
    """How many tokens an answer may have.

    Args:
        requested: What the request asks for.
        default: What is meant where it asks for nothing; None is as much as fits.
        prompt_length: Tokens of the prompt.
        max_context: Tokens of prompt and answer together.
        param: Field that asked for it.

    Raises:
        CapacityError: If prompt and answer do not fit together.
    """
    room = max_context - prompt_length
    if room < 1:
        raise CapacityError(
            f"prompt and answer must fit in {max_context} tokens, but the prompt has "
            f"{prompt_length}; shorten it",
            param="prompt",
        )
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        raise CapacityError(
            f"prompt and answer must fit in {max_context} tokens, got {prompt_length} in the "
            f"prompt and {param}={requested}; lower it to {room}, or shorten the prompt",
            param=param,
        )
    return requested


def generation_settings(
    values: Mapping[str, Any], defaults: GenerationConfig, *, max_new_tokens: int
) -> dict[str, Any]:
    """Say a request in the runtime's words.

    Args:
        values: What `SHARED_FIELDS` read.
        defaults: The bundle's settings.
        max_new_tokens: From `token_limit`.

    Returns:
        Keyword arguments of ``generate``; without the seed, which differs from choice to choice.
    """
    # A length of the bundle's would only be reported as overruled.
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_length": None}
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "stop")
    settings |= {name: values[name] for name in names if values[name] not in (None, [], {})}
    temperature = values["temperature"]
    given = {name: values[name] for name in ("top_p", "top_k", "min_p")}
    sampled = {name: value for name, value in given.items() if value is not None}
    if temperature is None and not sampled:
        return settings
    if temperature is not None and temperature < _GREEDY_BELOW:
        return settings | {"do_sample": False}
    if defaults.do_sample is not True:
        # OpenAI's defaults hold where the bundle has none for sampling.
        settings |= {"temperature": 1.0, "top_k": 0}
    if temperature is not None:
        settings["temperature"] = temperature
    if "top_k" in sampled:
        sampled["top_k"] = max(sampled["top_k"], 0)
    return settings | sampled | {"do_sample": True}
