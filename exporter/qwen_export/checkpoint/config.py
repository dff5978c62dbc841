"""What a Qwen checkpoint says about itself: config.json, read as transformers reads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_export.checkpoint.config_keys import SUPPORTED_MODEL_TYPES, find_config_key
from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.checkpoint.rope import RopeParameters, RopeScaling, read_rope, rope_scaling
from qwen_export.errors import CheckpointError, UnsupportedModelError

__all__ = ["ModelConfig", "require_supported"]

_LOG = logging.getLogger(__name__)

_DTYPES = ("bfloat16", "float16", "float32")
_LAYER_TYPES = ("full_attention", "sliding_attention")
# Earlier names that transformers still maps to today's.
_LAYER_TYPE_ALIASES = {"attention": "full_attention"}
_ACTIVATION_ALIASES = {"swish": "silu"}
_QWEN3_HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Qwen2 or Qwen3 config.json with every default filled in.

    Letters as elsewhere: V vocab_size, E hidden_size, F intermediate_size, L num_hidden_layers,
    H num_attention_heads, K num_key_value_heads, D head_dim.
    """

    model_type: str
    """"qwen2" or "qwen3"."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Divides num_attention_heads."""
    head_dim: int
    """Even; not always hidden_size / num_attention_heads."""
    rms_norm_eps: float
    hidden_act: str
    max_position_embeddings: int
    """Tokens the model was made for, prompt and answer together."""
    tie_word_embeddings: bool
    """What the config asks for; ``resolve_tying`` says what the tensors allow."""
    qkv_bias: bool
    """Biases on q_proj, k_proj and v_proj."""
    output_bias: bool
    """A bias on o_proj."""
    qk_norm: bool
    """RMSNorm over head_dim on queries and keys, before RoPE."""
    rope: RopeParameters
    layer_types: tuple[str, ...]
    """"full_attention" or "sliding_attention" for each layer."""
    sliding_window: int | None
    """Tokens a sliding layer sees, its own included; None where no window is in use."""
    dtype: str | None
    """"bfloat16", "float16" or "float32" as the config says; None: as the tensors are stored."""
    bos_token_id: int | tuple[int, ...] | None
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | tuple[int, ...] | None
    ignored_keys: tuple[str, ...]
    """Keys that are not known here and were not obeyed, sorted; show them to the user."""
    path: Path
    """The file all this was read from, for messages."""
    quantization_config: Mapping[str, Any] | None = None
    """How weights are stored, as the file says it; None or empty: plain. See
    ``checkpoint.quantized``."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], path: str | Path = "config.json") -> ModelConfig:
        """Read a config.json in the spelling of transformers 4 or 5.

        Unknown keys are kept in ``ignored_keys`` and logged as one warning.

        Args:
            raw: The parsed file. Not modified.
            path: The file, for messages and for ``.path``.

        Returns:
            The config, complete. It may still ask for something that cannot be exported; see
            ``require_supported``.

        Raises:
            UnsupportedModelError: If model_type is not supported, or a key asks for another kind
                of model (mixture of experts, ...).
            CheckpointError: If a value has the wrong type or contradicts another.

        Source:
            Qwen2Config, Qwen3Config and modeling_rope_utils.py of transformers 5.23.
        """
        path = Path(path)
        model_type = _model_type(raw, path)
        ignored = _check_keys(raw, model_type, path)
        values = ConfigValues(raw, path)
        num_hidden_layers = values.integer("num_hidden_layers", 32)
        num_attention_heads = values.integer("num_attention_heads", 32)
        hidden_size = values.integer("hidden_size", 4096)
        max_position_embeddings = values.integer("max_position_embeddings", 32768)
        # null means one KV head per head; a missing key means 32, whatever the heads are.
        num_key_value_heads = values.optional_integer("num_key_value_heads", 32)
        sliding_window = _sliding_window(values)
        rope, ignored_rope = read_rope(values, max_position_embeddings, _LAYER_TYPES)
        attention_bias = model_type == "qwen3" and values.boolean("attention_bias", False)
        hidden_act = values.text("hidden_act", "silu")
        config = cls(
            model_type=model_type,
            vocab_size=values.integer("vocab_size", 151936),
            hidden_size=hidden_size,
            intermediate_size=values.integer("intermediate_size", 22016),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=(
                num_attention_heads if num_key_value_heads is None else num_key_value_heads
            ),
            head_dim=values.integer(
                "head_dim",
                _QWEN3_HEAD_DIM if model_type == "qwen3" else hidden_size // num_attention_heads,
            ),
            rms_norm_eps=values.number("rms_norm_eps", 1e-6, zero=True),
            hidden_act=_ACTIVATION_ALIASES.get(hidden_act, hidden_act),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=values.boolean("tie_word_embeddings", False),
            qkv_bias=model_type == "qwen2" or attention_bias,
            output_bias=attention_bias,
            qk_norm=model_type == "qwen3",
            rope=rope,
            layer_types=_layer_types(values, num_hidden_layers, sliding_window),
            sliding_window=sliding_window,
            dtype=_dtype(values),
            bos_token_id=values.token_ids("bos_token_id"),
            eos_token_id=values.token_ids("eos_token_id"),
            pad_token_id=values.token_ids("pad_token_id"),
            ignored_keys=tuple(sorted((*ignored, *ignored_rope))),
            path=path,
            quantization_config=_quantization_config(values),
        )
        _check_consistency(config)
        if config.ignored_keys:
            _LOG.warning("%s: ignored unknown keys: %s", path, ", ".join(config.ignored_keys))
        return config

    def rope_scaling(self) -> RopeScaling | None:
        """The scaling of the rope type, None for "default"; raises as `require_supported`."""
        return rope_scaling(
            self.rope,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            path=self.path,
        )


def require_supported(config: ModelConfig) -> None:
    """Refuse a config that was read but cannot be exported.

    Args:
        config: The config to check.

    Raises:
        UnsupportedModelError: If it asks for another activation than SiLU or for a rope type that
            is not supported. The message names the key, the file and what is supported.
        CheckpointError: If a value of the rope mapping is missing, wrong or out of range.
    """
    if config.hidden_act != "silu":
        raise UnsupportedModelError(
            f"{config.path}: hidden_act {config.hidden_act!r} is not supported; 'silu' is",
            key="hidden_act",
        )
    config.rope_scaling()


def _model_type(raw: Mapping[str, Any], path: Path) -> str:
    supported = " and ".join(SUPPORTED_MODEL_TYPES)
    if "model_type" not in raw:
        raise CheckpointError(
            f"{path}: model_type is missing; a config.json must name one, and {supported} are "
            "supported",
            path=path,
        )
    model_type = raw["model_type"]
    if not isinstance(model_type, str) or model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"{path}: model_type {model_type!r} is not supported; {supported} are",
            key="model_type",
        )
    return model_type


def _check_keys(raw: Mapping[str, Any], model_type: str, path: Path) -> list[str]:
    """Refuse the keys that must be, and return the unknown ones that carry a value."""
    ignored = []
    for name, value in raw.items():
        key = find_config_key(name, model_type)
        if key is None:
            # null asks for nothing, whatever the key means.
            if value is not None:
                ignored.append(name)
        elif key.status == "refused" and value not in key.harmless:
            raise UnsupportedModelError(f"{path}: {name} is set, but {key.note}", key=name)
    return ignored


def _dtype(values: ConfigValues) -> str | None:
    for key in ("dtype", "torch_dtype"):
        value = values.raw.get(key)
        if value is None:
            continue
        if value not in _DTYPES:
            raise values.error(key, f"must be one of {', '.join(_DTYPES)}, or null", value)
        return str(value)
    return None


def _quantization_config(values: ConfigValues) -> Mapping[str, Any] | None:
    # Early compressed-tensors checkpoints have the second spelling.
    spellings = ("quantization_config", "compression_config")
    found = [values.mapping(key) for key in spellings if values.raw.get(key) is not None]
    return next((each for each in found if each), found[0] if found else None)


def _sliding_window(values: ConfigValues) -> int | None:
    """The window in use: published files carry a sliding_window next to the switch being off."""
    if not values.boolean("use_sliding_window", False):
        return None
    return values.optional_integer("sliding_window", 4096)


def _layer_types(values: ConfigValues, num_layers: int, window: int | None) -> tuple[str, ...]:
    first_sliding = values.integer("max_window_layers", 28, minimum=0)
    given = values.raw.get("layer_types")
    if given is None:
        return tuple(
            "sliding_attention" if window is not None and i >= first_sliding else "full_attention"
            for i in range(num_layers)
        )
    if not isinstance(given, list):
        raise values.error("layer_types", "must be a list or null", given)
    layer_types = tuple(_LAYER_TYPE_ALIASES.get(str(kind), str(kind)) for kind in given)
    for kind in layer_types:
        if kind not in _LAYER_TYPES:
            raise UnsupportedModelError(
                f"{values.path}: layer_types holds {kind!r}, which is not supported; "
                f"{' and '.join(_LAYER_TYPES)} are known",
                key="layer_types",
            )
    if len(layer_types) != num_layers:
        raise CheckpointError(
            f"{values.path}: layer_types must have num_hidden_layers = {num_layers} entries, got "
            f"{len(layer_types)}",
            path=values.path,
        )
    if window is None and "sliding_attention" in layer_types:
        raise CheckpointError(
            f"{values.path}: layer_types holds sliding_attention, which needs use_sliding_window "
            "true and a sliding_window",
            path=values.path,
        )
    return layer_types


def _check_consistency(config: ModelConfig) -> None:
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{config.path}: num_key_value_heads must divide num_attention_heads = "
            f"{config.num_attention_heads}, got {config.num_key_value_heads}",
            path=config.path,
        )
    if config.head_dim % 2:
        raise CheckpointError(
            f"{config.path}: head_dim must be even, because RoPE rotates pairs, got "
            f"{config.head_dim}",
            path=config.path,
        )
