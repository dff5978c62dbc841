"""What a request's settings mean to the runtime."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_runtime.errors import CapacityError
from qwen_runtime.generation_config import GenerationConfig
from qwen_runtime.server.chat_request import CHAT_REQUEST
from qwen_runtime.server.shared_fields import generation_settings, token_limit

GREEDY, SAMPLING = GenerationConfig(), GenerationConfig(do_sample=True, temperature=0.7, top_k=20)
LIMITS = {"max_new_tokens": 5, "max_length": None}


def settings(defaults: GenerationConfig, **fields: Any) -> dict[str, Any]:
    values = CHAT_REQUEST.read({"messages": [{"role": "user", "content": "a"}]} | fields)
    return generation_settings(values, defaults, max_new_tokens=5)


@pytest.mark.parametrize("defaults", [GREEDY, SAMPLING])
@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9])
def test_temperature_zero_is_greedy_whatever_else_is_asked(
    defaults: GenerationConfig, temperature: float
) -> None:
    asked = settings(defaults, temperature=temperature, top_p=0.5, top_k=3, min_p=0.1)
    assert asked == LIMITS | {"do_sample": False}


@pytest.mark.parametrize("defaults", [GREEDY, SAMPLING])
def test_settings_that_are_left_out_are_the_bundles(defaults: GenerationConfig) -> None:
    assert settings(defaults, temperature=None, stop=[], logit_bias={}) == LIMITS


def test_bundle_that_samples_keeps_its_other_settings() -> None:
    assert settings(SAMPLING, top_p=0.5) == LIMITS | {"do_sample": True, "top_p": 0.5}


def test_sampling_from_a_greedy_bundle_has_openais_defaults() -> None:
    expected = LIMITS | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.5}
    assert settings(GREEDY, top_p=0.5) == expected
    expected = LIMITS | {"do_sample": True, "temperature": 0.3, "top_k": 0}
    assert settings(GREEDY, temperature=0.3) == expected


def test_top_k_minus_one_is_off() -> None:
    assert settings(SAMPLING, top_k=-1)["top_k"] == 0


def test_penalties_bias_and_stops_are_passed_on() -> None:
    fields = {
        "repetition_penalty": 1.2,
        "presence_penalty": -1.0,
        "frequency_penalty": 0.5,
        "logit_bias": {"7": 2.0},
        "stop": ["a", "b"],
    }
    assert settings(GREEDY, **fields) == LIMITS | fields


@pytest.mark.parametrize(
    ("requested", "default", "expected"),
    [(None, None, 90), (None, 40, 40), (None, 400, 90), (7, 40, 7), (90, None, 90)],
)
def test_limit_is_what_was_asked_for_or_what_fits(
    requested: int | None, default: int | None, expected: int
) -> None:
    limits: dict[str, Any] = {"prompt_length": 10, "max_context": 100, "param": "max_tokens"}
    assert token_limit(requested, default, **limits) == expected


def test_limit_that_does_not_fit_names_the_numbers() -> None:
    limits: dict[str, Any] = {"prompt_length": 10, "max_context": 100, "param": "max_tokens"}
    with pytest.raises(CapacityError, match="100 tokens, got 10 in the prompt and max_tokens=91"):
        token_limit(91, None, **limits)
    with pytest.raises(CapacityError, match="100 tokens, but the prompt has 100"):
        token_limit(None, None, **limits | {"prompt_length": 100})
