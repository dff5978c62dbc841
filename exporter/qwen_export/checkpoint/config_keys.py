"""What is done with every key a Qwen2 or Qwen3 config.json may hold.

``CONFIG_KEYS`` is the one list: ``ModelConfig.from_dict`` refuses and skips by it, and
docs/config.md prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["CONFIG_KEYS", "SUPPORTED_MODEL_TYPES", "ConfigKey", "find_config_key"]

SUPPORTED_MODEL_TYPES = ("qwen2", "qwen3")

_BOTH = SUPPORTED_MODEL_TYPES


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One key of config.json and what becomes of it."""

    name: str
    """The key as config.json spells it."""
    status: Literal["honoured", "irrelevant", "refused"]
    """honoured: read and obeyed. irrelevant: cannot change the answers. refused: see harmless."""
    note: str
    """How it is honoured, why it is irrelevant, or what is refused about it."""
    model_types: tuple[str, ...] = _BOTH
    """The model types this row speaks of."""
    harmless: tuple[Any, ...] = ()
    """Refused keys only: the values that ask for nothing and are therefore accepted."""


def _honoured(name: str, note: str, model_types: tuple[str, ...] = _BOTH) -> ConfigKey:
    return ConfigKey(name, "honoured", note, model_types)


def _irrelevant(name: str, note: str, model_types: tuple[str, ...] = _BOTH) -> ConfigKey:
    return ConfigKey(name, "irrelevant", note, model_types)


def _refused(name: str, note: str, *harmless: Any) -> ConfigKey:
    return ConfigKey(name, "refused", note, _BOTH, harmless)


_MOE = "mixture-of-experts models are not supported; only dense layers are"
_MULTIMODAL = "models with parts beside the text decoder are not supported"
_BOOKKEEPING = "bookkeeping of the tool that wrote the file"
_CLASSIFIER = "describes a classification head; a causal language model has none"
_OUTPUT = "chooses what the Python call returns, not how it is computed"
_TOKEN_ID = "used only where the checkpoint has no generation_config.json, as in transformers"
_TRAINING = "used in training only"

CONFIG_KEYS: tuple[ConfigKey, ...] = (
    # What the model is.
    _honoured("model_type", "qwen2 or qwen3; any other is refused"),
    _honoured("vocab_size", "rows of the embedding table and of lm_head; default 151936"),
    _honoured("hidden_size", "default 4096"),
    _honoured("intermediate_size", "default 22016"),
    _honoured("num_hidden_layers", "default 32"),
    _honoured("num_attention_heads", "default 32"),
    _honoured("num_key_value_heads", "null: num_attention_heads; default 32"),
    _honoured("head_dim", "default hidden_size // num_attention_heads, rounded down", ("qwen2",)),
    _honoured("head_dim", "default 128, whatever hidden_size is", ("qwen3",)),
    _honoured("hidden_act", "silu (or swish, the same function); any other is refused"),
    _honoured("rms_norm_eps", "default 1e-6"),
    _honoured("max_position_embeddings", "default 32768; the default limit of a bundle"),
    _honoured(
        "tie_word_embeddings",
        "default false; true with two tables that differ keeps both, as transformers 5 does",
    ),
    _honoured("attention_bias", "biases of q, k, v and o; default false", ("qwen3",)),
    _irrelevant(
        "attention_bias", "Qwen2 always has biases on q, k and v and none on o", ("qwen2",)
    ),
    # Positions.
    _honoured(
        "rope_parameters",
        "the transformers 5 spelling; rope types default, linear, dynamic, yarn and llama3",
    ),
    _honoured(
        "rope_scaling", "the transformers 4 spelling; not empty, it replaces rope_parameters"
    ),
    _honoured("rope_theta", "used where the mapping above names none; default 10000"),
    _honoured(
        "partial_rotary_factor",
        "joins the mapping above; rope type default ignores it, others must have 1",
    ),
    _honoured(
        "layer_types",
        "full_attention or sliding_attention for each layer; wins over max_window_layers",
    ),
    _honoured("use_sliding_window", "default false: sliding_window has no effect"),
    _honoured("sliding_window", "tokens a sliding layer sees, its own included; default 4096"),
    _honoured("max_window_layers", "the first layer that slides, default 28; see sliding_window"),
    # Numbers and tokens.
    _honoured("dtype", "format of the original weights: bfloat16, float16, float32 or null"),
    _honoured("torch_dtype", "the transformers 4 spelling of dtype, which wins over it"),
    _honoured(
        "quantization_config",
        "weights stored by gptq, awq, compressed-tensors or fp8; any other method is refused",
    ),
    _honoured("compression_config", "an early spelling of quantization_config"),
    _honoured("bos_token_id", _TOKEN_ID),
    _honoured("eos_token_id", _TOKEN_ID),
    _honoured("pad_token_id", _TOKEN_ID),
    # What asks for another model.
    _refused("num_experts", _MOE, None, 0),
    _refused("num_experts_per_tok", _MOE, None, 0),
    _refused("moe_intermediate_size", _MOE, None),
    _refused("shared_expert_intermediate_size", _MOE, None),
    _refused("decoder_sparse_step", _MOE, None),
    _refused("mlp_only_layers", _MOE, None, []),
    _refused("norm_topk_prob", _MOE, None),
    _refused("text_config", _MULTIMODAL, None),
    _refused("vision_config", _MULTIMODAL, None),
    _refused("audio_config", _MULTIMODAL, None),
    _refused("is_encoder_decoder", "only decoders are supported", False, None),
    _refused("add_cross_attention", "cross attention is not supported", False, None),
    _refused("pruned_heads", "pruned heads are not supported", None, {}),
    _refused("per_layer_config", "layers that differ in shape are not supported", None, {}),
    # What cannot change the answers.
    _irrelevant("attention_dropout", _TRAINING),
    _irrelevant("initializer_range", _TRAINING),
    _irrelevant("router_aux_loss_coef", _TRAINING),
    _irrelevant("use_cache", "the bundle always keeps a KV cache"),
    _irrelevant("chunk_size_feed_forward", "Qwen2 and Qwen3 do not read it"),
    _irrelevant("use_mrope", "multimodal positions; text has one position per token"),
    _irrelevant("tie_last_hidden_states", _OUTPUT),
    _irrelevant("output_attentions", _OUTPUT),
    _irrelevant("output_hidden_states", _OUTPUT),
    _irrelevant("return_dict", _OUTPUT),
    _irrelevant("attn_implementation", "chooses a kernel in transformers"),
    _irrelevant("_attn_implementation", "chooses a kernel in transformers"),
    _irrelevant("_attn_implementation_autoset", "chooses a kernel in transformers"),
    _irrelevant("id2label", _CLASSIFIER),
    _irrelevant("label2id", _CLASSIFIER),
    _irrelevant("num_labels", _CLASSIFIER),
    _irrelevant("problem_type", _CLASSIFIER),
    _irrelevant("architectures", "the tensors are checked instead"),
    _irrelevant("transformers_version", _BOOKKEEPING),
    _irrelevant("torchscript", _BOOKKEEPING),
    _irrelevant("name_or_path", _BOOKKEEPING),
    _irrelevant("_name_or_path", _BOOKKEEPING),
    _irrelevant("_commit_hash", _BOOKKEEPING),
)

_BY_NAME = {(key.name, model_type): key for key in CONFIG_KEYS for model_type in key.model_types}


def find_config_key(name: str, model_type: str) -> ConfigKey | None:
    """Look up what is done with a key.

    Args:
        name: The key as config.json spells it.
        model_type: One of SUPPORTED_MODEL_TYPES.

    Returns:
        Its row of the table, or None for a key the table does not know.
    """
    return _BY_NAME.get((name, model_type))
