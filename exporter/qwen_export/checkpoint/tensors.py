"""Which tensors a checkpoint must hold, and whether it does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_export.checkpoint.config import ModelConfig
from qwen_export.errors import CheckpointError

__all__ = [
    "EMBEDDING_NAME",
    "FLOAT_TYPES",
    "LM_HEAD_NAME",
    "TensorInfo",
    "Tying",
    "check_tensors",
    "expected_tensors",
    "resolve_tying",
]

EMBEDDING_NAME = "model.embed_tokens.weight"
LM_HEAD_NAME = "lm_head.weight"
FLOAT_TYPES = ("bfloat16", "float16", "float32")
"""What plain tensors may be stored as."""

# Rotation frequencies that old versions of transformers stored; they follow from the config.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# Rows compared at a time where two tables may be one: bounds the memory touched at once.
_COMPARE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: as a file's header describes it, or put together of parts."""

    dtype: str
    """NumPy's name of the type it is read as; of `FLOAT_TYPES` but for parts of quantised ones."""
    shape: tuple[int, ...]
    """Linear layers are [out, in]."""
    file: Path
    """The file that holds it; of a quantised weight its codes."""
    offset: int
    """Where its data begin, in bytes from the start of the file; of a quantised weight its codes."""
    num_bytes: int
    """Size of its data as stored; of a quantised weight all its parts."""


@dataclass(frozen=True, slots=True)
class Tying:
    """Which tensors serve as the embedding table and as the output projection."""

    tied: bool
    """True: one table serves as both, and ``embedding == lm_head``."""
    embedding: str
    """Name of the tensor [V, E] that embeds token ids."""
    lm_head: str
    """Name of the tensor [V, E] that gives the logits."""


@dataclass(frozen=True, slots=True)
class _Expected:
    shape: tuple[int, ...]
    meaning: str
    """The shape in words of config.json."""


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List the tensors a config calls for.

    Args:
        config: The model's config.

    Returns:
        Shape by name, in the order of the layers; linear weights are [out, in]. A tied config
        names the embedding table only.
    """
    return {name: expected.shape for name, expected in _expected(config)}


def check_tensors(config: ModelConfig, available: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """Check that a checkpoint holds exactly what its config calls for.

    Args:
        config: The model's config.
        available: What the checkpoint holds, by name.

    Returns:
        Names of tensors that are not needed and harmless (stored rotary frequencies), sorted.

    Raises:
        CheckpointError: If a tensor is missing, is not called for, or has another shape or type.
            The message names the tensor, the file and what was expected.
    """
    expected = dict(_expected(config))
    if config.tie_word_embeddings and LM_HEAD_NAME in available:
        # A tied checkpoint may hold either name, or both.
        table = expected[EMBEDDING_NAME]
        expected[LM_HEAD_NAME] = table
        if EMBEDDING_NAME not in available:
            del expected[EMBEDDING_NAME]
    _check_missing(config, expected, available)
    for name, want in expected.items():
        info = available[name]
        if info.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{name} in {info.file.name} is stored as {info.dtype}, which is not supported; "
                f"{', '.join(FLOAT_TYPES)} are{_quantized_hint(config)}",
                path=info.file,
            )
        if info.shape != want.shape:
            raise CheckpointError(
                f"{name}: expected {list(want.shape)} {want.meaning} from {config.path.name}, got "
                f"{list(info.shape)} in {info.file.name}",
                path=info.file,
            )
    extra = sorted(available.keys() - expected.keys())
    unknown = [name for name in extra if not _HARMLESS.fullmatch(name)]
    if unknown:
        info = available[unknown[0]]
        raise CheckpointError(
            f"{unknown[0]} {list(info.shape)} in {info.file.name} is not part of the "
            f"{config.model_type} model that {config.path.name} describes{_and_more(unknown)}",
            path=info.file,
        )
    return tuple(extra)


def resolve_tying(
    config: ModelConfig,
    available: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray[Any, Any]],
    release: Callable[[str], object] = lambda _: None,
) -> Tying:
    """Decide whether embedding and output projection are one table.

    A tied config whose checkpoint holds two tables that differ is not tied, as in transformers 5.

    Args:
        config: The model's config.
        available: What the checkpoint holds, by name; ``check_tensors`` accepted it.
        read: Gives the data of a tensor by name. Called only where both tables are stored.
        release: Called with a table's name after each block of it was compared.

    Returns:
        The tables in effect.
    """
    if not config.tie_word_embeddings:
        return Tying(tied=False, embedding=EMBEDDING_NAME, lm_head=LM_HEAD_NAME)
    if EMBEDDING_NAME not in available:
        return Tying(tied=True, embedding=LM_HEAD_NAME, lm_head=LM_HEAD_NAME)
    if LM_HEAD_NAME in available and not _same_tables(read, release):
        return Tying(tied=False, embedding=EMBEDDING_NAME, lm_head=LM_HEAD_NAME)
    return Tying(tied=True, embedding=EMBEDDING_NAME, lm_head=EMBEDDING_NAME)


def _expected(config: ModelConfig) -> Iterator[tuple[str, _Expected]]:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries = config.num_attention_heads * head_dim
    keys = config.num_key_value_heads * head_dim
    q_words, kv_words = "num_attention_heads*head_dim", "num_key_value_heads*head_dim"
    norm = _Expected((hidden,), "(hidden_size)")
    table = _Expected((config.vocab_size, hidden), "(vocab_size, hidden_size)")
    yield EMBEDDING_NAME, table
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", norm
        for proj, rows, words in (
            ("q_proj", queries, q_words),
            ("k_proj", keys, kv_words),
            ("v_proj", keys, kv_words),
        ):
            shape = (rows, hidden)
            yield f"{layer}.self_attn.{proj}.weight", _Expected(shape, f"({words}, hidden_size)")
            if config.qkv_bias:
                yield f"{layer}.self_attn.{proj}.bias", _Expected((rows,), f"({words})")
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield f"{layer}.self_attn.{name}.weight", _Expected((head_dim,), "(head_dim)")
        out = _Expected((hidden, queries), f"(hidden_size, {q_words})")
        yield f"{layer}.self_attn.o_proj.weight", out
        if config.output_bias:
            yield f"{layer}.self_attn.o_proj.bias", norm
        yield f"{layer}.post_attention_layernorm.weight", norm
        wide = _Expected((inner, hidden), "(intermediate_size, hidden_size)")
        yield f"{layer}.mlp.gate_proj.weight", wide
        yield f"{layer}.mlp.up_proj.weight", wide
        down = _Expected((hidden, inner), "(hidden_size, intermediate_size)")
        yield f"{layer}.mlp.down_proj.weight", down
    yield "model.norm.weight", norm
    if not config.tie_word_embeddings:
        yield LM_HEAD_NAME, table


def _check_missing(
    config: ModelConfig, expected: Mapping[str, _Expected], available: Mapping[str, TensorInfo]
) -> None:
    missing = [name for name in expected if name not in available]
    if not missing:
        return
    want = expected[missing[0]]
    hint = ""
    module = missing[0].removesuffix(".weight")
    if {f"{module}.qweight", f"{module}.weight_packed"} & available.keys():
        hint = _quantized_hint(config)
    elif missing == [LM_HEAD_NAME]:
        hint = f"; set tie_word_embeddings to true in {config.path.name} if it is the embedding"
    raise CheckpointError(
        f"{missing[0]}: expected {list(want.shape)} {want.meaning} from {config.path.name}, but no "
        f"safetensors file of {config.path.parent} holds it{_and_more(missing)}{hint}",
        path=config.path.parent,
    )


def _quantized_hint(config: ModelConfig) -> str:
    if config.quantization_config:
        return ""
    empty = "" if config.quantization_config is None else ", and the one there is empty"
    return (
        f"; if the checkpoint is quantised, {config.path.name} must have the quantization_config "
        f"that the tool which made it writes there or to quantize_config.json{empty}"
    )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more like it)" if len(names) > 1 else ""


def _same_tables(
    read: Callable[[str], np.ndarray[Any, Any]], release: Callable[[str], object]
) -> bool:
    """Whether both tables [V, E] hold the same numbers, whatever their stored types."""
    left, right = read(EMBEDDING_NAME), read(LM_HEAD_NAME)
    rows = max(1, _COMPARE_BYTES // (left.shape[1] * left.itemsize))
    for start in range(0, left.shape[0], rows):
        a, b = left[start : start + rows], right[start : start + rows]
        # Bytes first: it is the common case, and NumPy compares bfloat16 slowly. Tables of two
        # types never have equal bytes and are compared by value.
        if not np.array_equal(a.view(np.uint8), b.view(np.uint8)) and not np.array_equal(a, b):
            return False
        release(EMBEDDING_NAME)
        release(LM_HEAD_NAME)
    return True
