"""Every setting of a checkpoint that matters, with a word where it is a trap."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qwen_export.checkpoint import ModelConfig
from qwen_export.formats import native_precision
from qwen_export.planning.source import Source

__all__ = ["Setting", "settings"]

# Shown as they stand where the config is of a kind that is not read.
_RAW_KEYS = (
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "use_sliding_window",
    "sliding_window",
    "eos_token_id",
    "quantization_config",
    "num_experts",
)
# What generation_config.json may hold that changes an answer when nothing is asked for.
_SAMPLING_KEYS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of the table."""

    name: str
    """The key, or several that belong together."""
    value: str
    """What is in effect."""
    note: str = ""
    """What to know about it."""
    trap: bool = False
    """Whether it differs from what one would take for granted."""


def settings(source: Source) -> list[Setting]:
    """Read the settings of a source.

    Returns:
        What is in effect, defaults filled in; for a config that cannot be read, the keys as they
        stand.
    """
    if source.config is None:
        return [
            Setting(key, json.dumps(source.raw[key])) for key in _RAW_KEYS if key in source.raw
        ]
    config = source.config
    return [
        *_shape(source, config),
        *_positions(source, config),
        *_tokens(source, config),
        *_weights(source, config),
    ]


def _shape(source: Source, config: ModelConfig) -> Iterator[Setting]:
    extras = [
        name
        for name, present in (
            ("q, k, v biases", config.qkv_bias),
            ("o bias", config.output_bias),
            ("q/k norm", config.qk_norm),
        )
        if present
    ]
    yield Setting("model_type", config.model_type, ", ".join(extras))
    yield Setting(
        "layers, hidden, MLP",
        f"{config.num_hidden_layers}, {config.hidden_size}, {config.intermediate_size}",
    )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    group = heads // kv_heads
    if "num_key_value_heads" not in source.raw:
        yield Setting("heads / kv heads", f"{heads} / {kv_heads}", "missing: 32 by default", True)
    else:
        shared = f"{group} query heads share a cache head" if group > 1 else "no sharing"
        yield Setting("heads / kv heads", f"{heads} / {kv_heads}", shared)
    derived = config.hidden_size / heads
    if config.head_dim != derived:
        note = f"not hidden_size / heads = {derived:g}: never derive it"
        yield Setting("head_dim", str(config.head_dim), note, True)
    else:
        yield Setting("head_dim", str(config.head_dim))
    yield _vocabulary(source, config)
    yield _tied(source, config)


def _vocabulary(source: Source, config: ModelConfig) -> Setting:
    rows = config.vocab_size
    if source.tokenizer is None:
        return Setting("vocab_size", f"{rows}", "no tokenizer: a bundle of token ids", True)
    document = json.loads(source.tokenizer.tokenizer_json)
    ids = set(document["model"]["vocab"].values())
    ids |= {token["id"] for token in document["added_tokens"]}
    known = max(ids, default=-1) + 1
    if known > rows:
        note = f"the tokenizer goes up to id {known - 1}, for which there is no row"
        return Setting("vocab_size", f"{rows}", note, True)
    note = f"{rows - known} rows beyond the tokenizer's {known} ids" if known < rows else ""
    return Setting("vocab_size", f"{rows}", note)


def _tied(source: Source, config: ModelConfig) -> Setting:
    asked = config.tie_word_embeddings
    if source.tying is None or source.tying.tied == asked:
        both = source.checkpoint is not None and asked and _holds_both(source.checkpoint.tensors)
        note = "both tables are stored, and are one" if both else ""
        if both and source.hollow:
            note = "both tables are stored; taken for one, as their numbers were not read"
        return Setting("tie_word_embeddings", _word(asked), note)
    return Setting(
        "tie_word_embeddings", "true", "two tables that differ are stored: both are kept", True
    )


def _holds_both(tensors: Mapping[str, Any]) -> bool:
    return {"model.embed_tokens.weight", "lm_head.weight"} <= tensors.keys()


def _positions(source: Source, config: ModelConfig) -> Iterator[Setting]:
    trained = config.max_position_embeddings
    limit = source.tokenizer.model_max_length if source.tokenizer else None
    note = "the bundle's limit unless --max-context says otherwise"
    if limit is not None and limit != trained:
        note += f"; the tokenizer's model_max_length is {limit}"
    yield Setting("max_position_embeddings", str(trained), note)
    yield Setting("rope_theta", f"{config.rope.rope_theta:g}")
    kind = config.rope.rope_type
    if kind != "default":
        values = ", ".join(f"{key} {_word(value)}" for key, value in config.rope.extra.items())
        notes = {
            "yarn": "changes short prompts too, not only those beyond the original length",
            "dynamic": "plain RoPE up to max_position_embeddings; a larger --max-context is refused",
        }
        yield Setting("rope type", f"{kind}: {values}", notes.get(kind, ""), kind in notes)
    else:
        yield Setting("rope type", kind)
    yield _window(source, config)


def _window(source: Source, config: ModelConfig) -> Setting:
    written = source.raw.get("sliding_window")
    sliding = [i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    if config.sliding_window is None or not sliding:
        if written is None:
            return Setting("sliding_window", "off")
        why = "use_sliding_window is false" if config.sliding_window is None else "no layer slides"
        return Setting("sliding_window", "off", f"{written} is written, but {why}", True)
    note = f"layers {_ranges(sliding)} of {config.num_hidden_layers} see no further back"
    return Setting("sliding_window", f"{config.sliding_window} tokens", note, True)


def _tokens(source: Source, config: ModelConfig) -> Iterator[Setting]:
    ours = _ids(config.eos_token_id)
    theirs = _ids(source.raw_generation.get("eos_token_id"))
    if "eos_token_id" in source.raw_generation:
        differ = ours != theirs
        note = f"of generation_config.json; config.json says {_list(ours)}" if differ else ""
        yield Setting("eos_token_id", _list(theirs), note, differ)
    elif source.raw_generation:
        note = (
            f"generation_config.json names none: only length stops; config.json says {_list(ours)}"
        )
        yield Setting("eos_token_id", "none", note, True)
    else:
        yield Setting(
            "eos_token_id", _list(ours), "" if ours else "nothing but length stops it", not ours
        )
    given = {
        key: source.raw_generation[key] for key in _SAMPLING_KEYS if key in source.raw_generation
    }
    text = ", ".join(f"{key} {_word(value)}" for key, value in given.items())
    penalised = given.get("repetition_penalty", 1) != 1
    note = "holds for greedy decoding too: repetition_penalty" if penalised else ""
    yield Setting("generation defaults", text or "greedy", note, penalised)
    if source.tokenizer is not None:
        names = ", ".join(source.tokenizer.chat_templates)
        yield Setting(
            "chat template", names or "none", "" if names else "messages cannot be sent", not names
        )


def _weights(source: Source, config: ModelConfig) -> Iterator[Setting]:
    stored = sorted({tensor.dtype for tensor in source.stored})
    yield Setting(
        "dtype", config.dtype or "as stored", f"stored as {', '.join(stored)}" if stored else ""
    )
    if config.quantization_config:
        yield _quantization(source, config.quantization_config)
    if config.ignored_keys:
        note = "not known, and not obeyed"
        yield Setting("other keys", ", ".join(config.ignored_keys), note, True)


def _quantization(source: Source, written: Mapping[str, Any]) -> Setting:
    method = _word(written.get("quant_method"))
    if source.checkpoint is None:
        return Setting("quantization_config", method, trap=True)
    exact = source.checkpoint.exact_bits(read=False)
    native = native_precision(exact.values())
    plain = len(source.checkpoint.tensors) - len(exact)
    if native == "fp32":
        note = "no integers hold them exactly: fp32 by default, 4 bytes a weight"
    else:
        note = f"kept exactly by default, at --precision {native}"
    value = f"{method}: {len(exact)} weights, {plain} plain tensors"
    return Setting("quantization_config", value, note, native == "fp32")


def _ids(value: object) -> tuple[int, ...]:
    """The ids of a number or a list; what else may stand there is refused by the build."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(entry for entry in values if isinstance(entry, int))


def _list(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids)) or "none"


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _ranges(numbers: list[int]) -> str:
    """Runs of whole numbers in words: "0-3, 7"."""
    runs = [
        [number for _, number in group]
        for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
