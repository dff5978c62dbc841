"""Checkpoints as they come: config, tensors, tokenizer, generation settings."""

from __future__ import annotations

from qwen_export.checkpoint.config import ModelConfig, require_supported
from qwen_export.checkpoint.config_keys import CONFIG_KEYS, SUPPORTED_MODEL_TYPES, ConfigKey
from qwen_export.checkpoint.quantized import QuantizedWeight
from qwen_export.checkpoint.reader import Checkpoint, open_checkpoint
from qwen_export.checkpoint.rope import RopeParameters
from qwen_export.checkpoint.tensors import (
    TensorInfo,
    Tying,
    check_tensors,
    expected_tensors,
    resolve_tying,
)
from qwen_export.checkpoint.tokenizer_files import TokenizerFiles, read_tokenizer_files

__all__ = [
    "CONFIG_KEYS",
    "SUPPORTED_MODEL_TYPES",
    "Checkpoint",
    "ConfigKey",
    "ModelConfig",
    "QuantizedWeight",
    "RopeParameters",
    "TensorInfo",
    "TokenizerFiles",
    "Tying",
    "check_tensors",
    "expected_tensors",
    "open_checkpoint",
    "read_tokenizer_files",
    "require_supported",
    "resolve_tying",
]
