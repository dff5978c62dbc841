"""Names of transformers' generation settings that the runtime refuses or does not need.

docs/generation.md shows these tables to users; a test compares both with transformers.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from qwen_runtime.errors import RequestError

__all__ = [
    "DEFAULTS",
    "GENERATE_ARGUMENTS",
    "IRRELEVANT",
    "OUT_OF_SCOPE",
    "OUT_OF_SCOPE_DEFAULTS",
    "WITHOUT_EFFECT",
    "refuse_names",
]

DEFAULTS: Final[Mapping[str, object]] = MappingProxyType(
    {
        "assistant_confidence_threshold": 0.4,
        "assistant_lookbehind": 10,
        "do_sample": False,
        "early_stopping": False,
        "encoder_no_repeat_ngram_size": 0,
        "encoder_repetition_penalty": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "frequency_penalty": 0.0,
        "guidance_scale": 1.0,
        "length_penalty": 1.0,
        "logprobs": False,
        "max_length": 20,
        "max_matching_ngram_size": 2,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_assistant_tokens": 20,
        "num_assistant_tokens_schedule": "constant",
        "num_beams": 1,
        "num_return_sequences": 1,
        "output_logits": False,
        "output_scores": False,
        "presence_penalty": 0.0,
        "remove_invalid_values": False,
        "renormalize_logits": False,
        "repetition_penalty": 1.0,
        "return_dict_in_generate": False,
        "rng": "default",
        "target_lookbehind": 10,
        "temperature": 1.0,
        "top_k": 50,
        "top_logprobs": 0,
        "top_p": 1.0,
        "typical_p": 1.0,
    }
)
"""Values of settings that nobody gave, as in transformers; all others are None."""

OUT_OF_SCOPE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "assistant_early_exit": "Qwen checkpoints have no early-exit heads; use a draft bundle",
        "constraints": "constrained beam search left transformers; use response_format or "
        "prefix_allowed_tokens_fn",
        "diversity_penalty": "group beam search left transformers; sample with "
        "num_return_sequences for varied outputs",
        "dola_layers": "DoLa decoding left transformers and needs logits of inner layers; "
        "leave it out",
        "force_words_ids": "constrained beam search left transformers; use response_format or "
        "prefix_allowed_tokens_fn",
        "low_memory": "transformers' beam search refuses it as well; lower num_beams instead",
        "num_beam_groups": "group beam search left transformers; use num_beams alone",
        "output_attentions": "the graphs do not return attention weights; use transformers "
        "to inspect them",
        "output_hidden_states": "the graphs do not return hidden states; use transformers "
        "to inspect them",
        "penalty_alpha": "contrastive search left transformers; use do_sample=True with top_k",
        "speculation_type": "Qwen2 and Qwen3 checkpoints hold no draft heads; use a draft bundle",
        "token_healing": "it rewrites the prompt's tokens; end the prompt at a word boundary",
        "use_mtp": "Qwen2 and Qwen3 checkpoints hold no multi-token heads; use a draft bundle",
        "watermarking_config": "watermarks are not applied; process the scores with a custom "
        "logits processor",
    }
)
"""Settings refused by name, and what to do instead."""

OUT_OF_SCOPE_DEFAULTS: Final[Mapping[str, object]] = MappingProxyType(
    {"diversity_penalty": 0.0, "num_beam_groups": 1}
)
"""Values of these that change nothing; for the others None and False."""

IRRELEVANT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "cache_config": "bundles have one kind of cache",
        "cache_implementation": "bundles have one kind of cache",
        "compile_config": "the graphs are compiled when the bundle is built",
        "continuous_batching_config": "the engine batches by itself",
        "decoder_start_token_id": "it is for encoder-decoder models",
        "disable_compile": "the graphs are compiled when the bundle is built",
        "is_assistant": "a bundle is a draft by being passed as one",
        "max_cache_len": "the cache grows with the sequence",
        "prefill_chunk_size": "the tokens are the same; the engine chooses the chunks",
        "use_cache": "the tokens are the same; the cache is always used",
    }
)
"""Settings that cannot change the tokens of a decoder-only model, and why."""

WITHOUT_EFFECT: Final = frozenset(IRRELEVANT) - {"prefill_chunk_size", "use_cache"}
"""Irrelevant settings that warn when given; the other two do what was asked: same tokens."""

GENERATE_ARGUMENTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "assistant_model": "an argument of generate()",
        "assistant_tokenizer": "an argument of generate()",
        "attention_mask": "an argument of generate(), next to input_ids",
        "custom_generate": "code from the hub, which is never run",
        "generation_config": "an argument of generate()",
        "input_ids": "the prompt, the first argument of generate()",
        "inputs": "the prompt, the first argument of generate()",
        "inputs_embeds": "not an input of the graphs; pass token ids",
        "logits_processor": "an argument of generate()",
        "negative_prompt_attention_mask": "an argument of generate()",
        "negative_prompt_ids": "an argument of generate()",
        "past_key_values": "kept by the engine; pass the whole prompt",
        "position_ids": "computed from the attention mask",
        "prefix_allowed_tokens_fn": "an argument of generate()",
        "stopping_criteria": "an argument of generate()",
        "streamer": "replaced by stream()",
        "synced_gpus": "for training frameworks; leave it out",
        "tokenizer": "part of the bundle; leave it out",
        "trust_remote_code": "code from the hub, which is never run",
    }
)
"""What transformers takes beside the settings, and where it belongs here."""

# Names of other interfaces that difflib would not find.
_OTHER_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "best_of": "num_beams",
        "max_completion_tokens": "max_new_tokens",
        "max_tokens": "max_new_tokens",
        "min_tokens": "min_new_tokens",
        "n": "num_return_sequences",
        "stop_sequences": "stop",
        "stop_token_ids": "eos_token_id",
    }
)


def refuse_names(given: Mapping[str, object], known: Iterable[str]) -> dict[str, object]:
    """Sort out names that are no settings of the runtime.

    Args:
        given: Settings by name.
        known: Names of the runtime's settings.

    Returns:
        The settings of ``given`` that the runtime has, in their order.

    Raises:
        RequestError: Naming the first setting that is out of scope with a value that would
            change something, an argument of generate(), or unknown.
    """
    names = set(known)
    settings: dict[str, object] = {}
    for name, value in given.items():
        if name in names:
            settings[name] = value
        elif name in OUT_OF_SCOPE:
            inert = OUT_OF_SCOPE_DEFAULTS.get(name, False)
            if value is not None and value is not inert and value != inert:
                raise RequestError(
                    f"{name} is not supported, got {value!r}: {OUT_OF_SCOPE[name]}", param=name
                )
        elif name in GENERATE_ARGUMENTS:
            raise RequestError(
                f"{name} is not a generation setting, it is {GENERATE_ARGUMENTS[name]}",
                param=name,
            )
        elif name not in IRRELEVANT:
            raise RequestError(f"unknown setting {name!r}{_suggestion(name, names)}", param=name)
    return settings


def _suggestion(name: str, known: set[str]) -> str:
    other = _OTHER_NAMES.get(name)
    close = [other] if other else difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; docs/generation.md lists all settings"
