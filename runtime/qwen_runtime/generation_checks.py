"""Checks of single generation settings: their types, and their ranges while they are active."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, TypeGuard

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.bias import check_bad_words, check_sequence_bias
from qwen_runtime.sampling.rng import check_seed

__all__ = ["GenerationConfigWarning", "check_irrelevant", "normalize"]

_CACHE_IMPLEMENTATIONS: Final = (
    "dynamic",
    "hybrid",
    "hybrid_chunked",
    "offloaded",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
    "offloaded_static",
    "paged",
    "quantized",
    "sliding_window",
    "static",
)


class GenerationConfigWarning(UserWarning):
    """A setting has no effect or not the one that seems intended."""


def _fail(name: str, must: str, value: object, hint: str = "") -> RequestError:
    return RequestError(f"{name} must be {must}, got {value!r}{hint}", param=name)


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _fail(name, "true or false", value)
    return value


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _int(name: str, value: object) -> int:
    if not _is_int(value):
        raise _fail(name, "an integer", value)
    return int(value)


def _at_least(minimum: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if not _is_int(value) or value < minimum:
            raise _fail(name, f"an integer >= {minimum}", value)
        return int(value)

    return check


def _number(name: str, value: object) -> float:
    """A finite number; an int stays one, because some settings refuse it while active."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise _fail(name, "a number", value)
    if not math.isfinite(value):
        raise _fail(name, "a finite number", value)
    return int(value) if isinstance(value, int | np.integer) else float(value)


def _between(
    low: float, high: float, *, open_ends: bool = False
) -> Callable[[str, object], float]:
    def check(name: str, value: object) -> float:
        number = _number(name, value)
        if not low <= number <= high or (open_ends and number in (low, high)):
            ends = ("(", ")") if open_ends else ("[", "]")
            raise _fail(name, f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}", value)
        return float(number)

    return check


def _at_least_zero(name: str, value: object) -> float:
    number = _number(name, value)
    if number < 0:
        raise _fail(name, "a number >= 0", value)
    return float(number)


def _ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | np.ndarray) or not all(_is_int(i) for i in value):
        raise _fail(name, "a list of token ids", value)
    return tuple(int(i) for i in value)


def _id_or_ids(name: str, value: object) -> int | tuple[int, ...]:
    return _int(name, value) if _is_int(value) else _ids(name, value)


def _forced(name: str, value: object) -> int | tuple[int, ...]:
    ids = _id_or_ids(name, value)
    for token_id in (ids,) if isinstance(ids, int) else ids:
        if token_id < 0:
            raise _fail(name, "a token id >= 0 or a list of them", value)
    return ids


def _strings(name: str, value: object) -> str | tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(s, str) for s in strings):
        raise _fail(name, "a string or a list of strings", value)
    if "" in strings:
        raise _fail(name, "non-empty strings", value, "; an empty string would stop everywhere")
    return value if isinstance(value, str) else tuple(strings)


def _one_of(*choices: object) -> Callable[[str, object], object]:
    def check(name: str, value: object) -> object:
        if not any(value is c or (isinstance(c, str) and value == c) for c in choices):
            raise _fail(name, "one of " + ", ".join(map(repr, choices)), value)
        return value

    return check


def _decay(name: str, value: object) -> tuple[int, float]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not _is_int(value[0]):
        raise _fail(name, "a pair (start, factor) of an integer and a number", value)
    return int(value[0]), float(_number(name, value[1]))


def _bad_words(name: str, value: object) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(word) for word in check_bad_words(value))


def _bias(name: str, value: object) -> tuple[tuple[tuple[int, ...], float], ...]:
    return tuple(check_sequence_bias(value).items())


def _logit_bias(name: str, value: object) -> tuple[tuple[int, float], ...]:
    if isinstance(value, tuple):  # already in this form
        value = dict(value)
    if not isinstance(value, Mapping):
        raise _fail(name, "a dictionary of token id to bias", value)
    biases = []
    for key, bias in value.items():
        token_id = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not _is_int(token_id) or token_id < 0:
            raise _fail(name, "a dictionary with token ids >= 0 as keys", value)
        biases.append((int(token_id), float(_number(name, bias))))
    return tuple(biases)


def _response_format(name: str, value: object) -> object:
    # The package knows the engine's processors, which know these settings.
    from qwen_runtime.structured import parse_response_format

    parse_response_format(value)
    return value


_CHECKS: Final[Mapping[str, Callable[[str, object], object]]] = {
    "assistant_confidence_threshold": _between(0, 1),
    "assistant_ensemble_weight": _between(0, 1, open_ends=True),
    "assistant_lookbehind": _at_least(1),
    "bad_words_ids": _bad_words,
    "begin_suppress_tokens": _ids,
    "bos_token_id": _int,
    "do_sample": _bool,
    "early_stopping": _one_of(True, False, "never"),
    "encoder_no_repeat_ngram_size": _int,
    "encoder_repetition_penalty": _number,
    "eos_token_id": _id_or_ids,
    "epsilon_cutoff": _number,
    "eta_cutoff": _number,
    "exponential_decay_length_penalty": _decay,
    "forced_bos_token_id": _at_least(0),
    "forced_eos_token_id": _forced,
    "frequency_penalty": _between(-2, 2),
    "guidance_scale": _number,
    "length_penalty": _number,
    "logit_bias": _logit_bias,
    "logprobs": _bool,
    "max_length": _at_least(1),
    "max_matching_ngram_size": _at_least(1),
    "max_new_tokens": _at_least(1),
    "max_time": _at_least_zero,
    "min_length": _int,
    "min_new_tokens": _at_least(0),
    "min_p": _number,
    "no_repeat_ngram_size": _int,
    "num_assistant_tokens": _at_least(1),
    "num_assistant_tokens_schedule": _one_of("constant", "heuristic", "heuristic_transient"),
    "num_beams": _at_least(1),
    "num_return_sequences": _at_least(1),
    "output_logits": _bool,
    "output_scores": _bool,
    "pad_token_id": _int,
    "presence_penalty": _between(-2, 2),
    "prompt_lookup_num_tokens": _at_least(1),
    "remove_invalid_values": _bool,
    "renormalize_logits": _bool,
    "repetition_penalty": _number,
    "response_format": _response_format,
    "return_dict_in_generate": _bool,
    "rng": _one_of("default", "torch"),
    "seed": lambda name, value: check_seed(int(value) if _is_int(value) else value),
    "sequence_bias": _bias,
    "stop": _strings,
    "stop_strings": _strings,
    "suppress_tokens": _ids,
    "target_lookbehind": _at_least(1),
    "temperature": _number,
    "top_h": _number,
    "top_k": _number,
    "top_logprobs": _at_least(0),
    "top_p": _number,
    "typical_p": _number,
}


_IRRELEVANT_CHECKS: Final[Mapping[str, Callable[[str, object], object]]] = {
    "cache_implementation": _one_of(*_CACHE_IMPLEMENTATIONS),
    "prefill_chunk_size": _at_least(1),
    "use_cache": _bool,
}


def check_irrelevant(name: str, value: object) -> None:
    """Check a setting that changes nothing, as far as transformers checks it.

    Raises:
        RequestError: If transformers would refuse the value as well.
    """
    if value is not None and name in _IRRELEVANT_CHECKS:
        _IRRELEVANT_CHECKS[name](name, value)


def normalize(name: str, value: object) -> object:
    """Check the type of a setting and bring it into an immutable form.

    Ranges that only matter while a setting is active (those of the warpers, for example, which
    greedy decoding does not use) are checked by the processors' constructors.

    Args:
        name: Name of the setting.
        value: What was given; None passes.

    Returns:
        The value: lists as tuples, NumPy scalars as Python's.

    Raises:
        RequestError: Naming the setting and the value.
    """
    return None if value is None else _CHECKS[name](name, value)
