"""The steps behind ``generation_config.resolve``: lengths, neutral values, checks, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Set
from typing import Any, Final

from qwen_runtime.errors import RequestError
from qwen_runtime.generation_checks import GenerationConfigWarning
from qwen_runtime.generation_fields import DEFAULTS
from qwen_runtime.resolved_config import ResolvedConfig
from qwen_runtime.sampling.build import build_warpers
from qwen_runtime.sampling.checks import check_positive_float

__all__ = ["check_resolved", "complete", "warn_resolved"]

# transformers' values with which a sampling setting counts as not set, in its order.
_SAMPLING_ONLY: Final[Mapping[str, object]] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "top_k": 50,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_BEAMS_ONLY: Final[Mapping[str, object]] = {"early_stopping": False, "length_penalty": 1.0}
# Settings passed on as they are.
_PLAIN: Final = frozenset(ResolvedConfig.__dataclass_fields__) - {
    "eos_token_ids",
    "explicit_pad_token_id",
    "forced_eos_token_ids",
    "max_length",
    "max_new_tokens",
    "min_length",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prompt_length",
    "stop",
    "stop_strings",
}


def _warn(message: str) -> None:
    warnings.warn(message, GenerationConfigWarning, stacklevel=5)


def _several(value: Any) -> tuple[Any, ...]:
    """One value, several or None as a tuple."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def complete(
    merged: Mapping[str, Any],
    *,
    default_max_length: bool,
    default_min_length: bool,
    prompt_length: int,
    max_position_embeddings: int | None,
) -> ResolvedConfig:
    """Work out lengths and tokens, and put the neutral value where a setting is off.

    Args:
        merged: Every setting after precedence; None is off.
        default_max_length: Whether nobody set max_length.
        default_min_length: Whether nobody set min_length.
        prompt_length: Tokens of the prompt, padding included.
        max_position_embeddings: Caps a length that nobody set.

    Raises:
        RequestError: If the prompt leaves no room for a token.
    """
    settings: dict[str, Any] = {
        name: (0 if name == "top_k" else DEFAULTS.get(name))
        if merged[name] is None
        else merged[name]
        for name in _PLAIN
    }
    settings["min_new_tokens"] = merged["min_new_tokens"] or 0
    max_length, min_length = merged["max_length"], merged["min_length"] or 0
    if merged["max_new_tokens"] is not None:
        if not default_max_length:
            _warn(
                f"both max_new_tokens={merged['max_new_tokens']} and max_length={max_length} are "
                "set; max_new_tokens wins"
            )
        max_length = prompt_length + merged["max_new_tokens"]
    elif default_max_length:
        max_length = prompt_length + 20
        if max_position_embeddings is not None:
            max_length = min(max_length, max_position_embeddings)
        _warn(
            f"no length was given, so generation ends at the default max_length={max_length}; "
            "set max_new_tokens"
        )
    if prompt_length >= max_length:
        raise RequestError(
            f"max_length must be above the prompt's {prompt_length} tokens, got {max_length}; "
            "raise it, or set max_new_tokens instead",
            param="max_length",
        )
    if merged["min_new_tokens"] is not None:
        if not default_min_length:
            _warn(
                f"both min_new_tokens={merged['min_new_tokens']} and min_length={min_length} are "
                "set; min_new_tokens wins"
            )
        min_length = prompt_length + merged["min_new_tokens"]
    returned = settings["return_dict_in_generate"] is True
    eos_token_ids = _several(merged["eos_token_id"])
    pad_token_id = merged["pad_token_id"]
    return ResolvedConfig(
        **settings,
        prompt_length=prompt_length,
        max_length=max_length,
        max_new_tokens=max_length - prompt_length,
        min_length=min_length,
        eos_token_ids=eos_token_ids,
        explicit_pad_token_id=pad_token_id,
        pad_token_id=eos_token_ids[0] if pad_token_id is None and eos_token_ids else pad_token_id,
        forced_eos_token_ids=_several(merged["forced_eos_token_id"]) or None,
        stop_strings=_several(merged["stop_strings"]),
        stop=_several(merged["stop"]),
        output_scores=returned and merged["output_scores"] is True,
        output_logits=returned and merged["output_logits"] is True,
    )


def check_resolved(resolved: ResolvedConfig, *, vocab_size: int, has_tokenizer: bool) -> None:
    """Check active settings against their ranges, the vocabulary and each other.

    Raises:
        RequestError: Naming the setting.
    """
    for name in ("repetition_penalty", "encoder_repetition_penalty"):
        if getattr(resolved, name) != 1.0:
            check_positive_float(getattr(resolved, name), name=name)
    build_warpers(resolved)
    _check_tokens(resolved, vocab_size)
    returned = resolved.num_return_sequences
    if returned > 1 and resolved.num_beams == 1 and not resolved.do_sample:
        raise RequestError(
            "num_return_sequences must be 1 in greedy decoding, which has one answer, got "
            f"{returned}; set do_sample=True or num_beams",
            param="num_return_sequences",
        )
    if returned > resolved.num_beams > 1:
        raise RequestError(
            f"num_return_sequences must be at most num_beams={resolved.num_beams}, got "
            f"{returned}; raise num_beams",
            param="num_return_sequences",
        )
    if resolved.prompt_lookup_num_tokens is not None and resolved.num_beams == 1 < returned:
        raise RequestError(
            f"num_return_sequences must be 1 with prompt lookup, got {returned}; "
            "leave out prompt_lookup_num_tokens",
            param="num_return_sequences",
        )
    if resolved.top_logprobs and not resolved.logprobs:
        raise RequestError(
            f"top_logprobs needs logprobs=True, got top_logprobs={resolved.top_logprobs} without; "
            "set both",
            param="top_logprobs",
        )
    if resolved.top_logprobs > vocab_size:
        raise RequestError(
            f"top_logprobs must be at most {vocab_size} (the vocabulary), got "
            f"{resolved.top_logprobs}; lower it",
            param="top_logprobs",
        )
    for name in ("stop_strings", "stop"):
        if getattr(resolved, name) and not has_tokenizer:
            raise RequestError(
                f"{name} needs a tokenizer, and the bundle has none; stop at eos_token_id instead",
                param=name,
            )
    if resolved.exponential_decay_length_penalty is not None and not resolved.eos_token_ids:
        raise RequestError(
            "exponential_decay_length_penalty raises the end tokens, but there are none; "
            "set eos_token_id",
            param="exponential_decay_length_penalty",
        )


def _check_tokens(resolved: ResolvedConfig, vocab_size: int) -> None:
    forced = {
        "forced_bos_token_id": _several(resolved.forced_bos_token_id),
        "forced_eos_token_id": resolved.forced_eos_token_ids or (),
    }
    used = forced | {
        "bad_words_ids": tuple(i for word in resolved.bad_words_ids or () for i in word),
        "sequence_bias": tuple(i for ids, _ in resolved.sequence_bias or () for i in ids),
        "logit_bias": tuple(i for i, _ in resolved.logit_bias or ()),
    }
    for name, ids in used.items():
        beyond = sorted({i for i in ids if i >= vocab_size})
        if beyond:
            raise RequestError(
                f"{name} must hold token ids below the vocabulary size {vocab_size}, got "
                f"{beyond}; remove them",
                param=name,
            )
    for name, ids in forced.items():
        if ids and set(ids) <= set(resolved.suppress_tokens or ()):
            raise RequestError(
                f"{name} must keep a token that suppress_tokens leaves, got {sorted(set(ids))}, "
                "all suppressed; remove it from one of them",
                param=name,
            )


def warn_resolved(resolved: ResolvedConfig, explicit: Set[str]) -> None:
    """Warn of settings without effect that the caller gave, and of lengths out of reach.

    Args:
        resolved: The settings.
        explicit: Names the caller set; what a bundle's file brings along stays silent.
    """
    if not resolved.do_sample:
        unused = _differing(resolved, _SAMPLING_ONLY, explicit)
        if unused:
            _warn(f"{', '.join(unused)} have no effect without sampling; set do_sample=True")
    if resolved.num_beams == 1:
        unused = _differing(resolved, _BEAMS_ONLY, explicit)
        if unused:
            _warn(f"{', '.join(unused)} have no effect with one beam; set num_beams")
    elif resolved.prompt_lookup_num_tokens is not None:
        _warn("prompt_lookup_num_tokens has no effect in beam search; leave one of them out")
    unused = [name for name in ("output_scores", "output_logits") if name in explicit]
    if unused and not resolved.return_dict_in_generate:
        _warn(f"{', '.join(unused)} have no effect; set return_dict_in_generate=True as well")
    pad = resolved.explicit_pad_token_id
    if pad is not None and pad < 0:
        _warn(f"pad_token_id={pad} is no token, so a batch cannot be padded; set one >= 0")
    if any(i < 0 for i in resolved.eos_token_ids):
        _warn(
            f"eos_token_id={list(resolved.eos_token_ids)} holds negative ids, which never occur; "
            "generation may run to its length limit"
        )
    if resolved.min_length > resolved.max_length:
        _warn(
            f"the minimum length {resolved.min_length} (min_length or prompt plus "
            f"min_new_tokens={resolved.min_new_tokens}) is above the maximum "
            f"{resolved.max_length}, where generation ends; lower it or raise max_new_tokens"
        )


def _differing(
    resolved: ResolvedConfig, neutral: Mapping[str, object], explicit: Set[str]
) -> list[str]:
    return [n for n, value in neutral.items() if n in explicit and getattr(resolved, n) != value]
