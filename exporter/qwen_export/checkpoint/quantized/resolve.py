"""From a config's quantization_config and the stored tensors to the weights they stand for."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_export.checkpoint.config import ModelConfig
from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.checkpoint.quantized.awq import AwqMethod
from qwen_export.checkpoint.quantized.compressed import CompressedMethod
from qwen_export.checkpoint.quantized.fp8 import Fp8Method
from qwen_export.checkpoint.quantized.gptq import GptqMethod
from qwen_export.checkpoint.quantized.method import Method, module_of
from qwen_export.checkpoint.quantized.parts import Part, StoredTensors
from qwen_export.checkpoint.quantized.weight import QuantizedWeight
from qwen_export.checkpoint.tensors import (
    EMBEDDING_NAME,
    LM_HEAD_NAME,
    TensorInfo,
    expected_tensors,
)
from qwen_export.errors import CheckpointError, UnsupportedModelError

__all__ = ["METHODS", "ResolvedTensors", "read_method", "resolve_tensors"]

_LOG = logging.getLogger(__name__)

METHODS: Mapping[str, type[AwqMethod | CompressedMethod | Fp8Method | GptqMethod]] = {
    "gptq": GptqMethod,
    "awq": AwqMethod,
    "compressed-tensors": CompressedMethod,
    "fp8": Fp8Method,
}
"""Supported values of quant_method."""

# Scales of activations and of a quantised KV cache: neither is quantised here, so that nothing
# multiplies by them.
_SCALES = re.compile(
    r".*\.((input|output|activation|act)_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point)"
    r"|kv_scale|k_cache_scale|v_cache_scale)"
)
_GROUP_INDEX = re.compile(r".*\.(weight_)?g_idx")
_FIXED_ZERO = re.compile(r".*\.weight_zero_point")


@dataclass(frozen=True, slots=True)
class ResolvedTensors:
    """A checkpoint's tensors under the names of the plain model."""

    tensors: Mapping[str, TensorInfo]
    """What is stored plain and what the quantised parts stand for, by name."""
    quantized: Mapping[str, QuantizedWeight]
    """The weights in ``tensors`` that are stored quantised."""
    harmless: tuple[str, ...]
    """Stored names beside both that cannot change the model, sorted."""


def read_method(config: ModelConfig) -> Method | None:
    """Read quantization_config.

    Args:
        config: The model's config.

    Returns:
        How weights are stored; None for plain weights.

    Raises:
        UnsupportedModelError: If the method, or what it asks for, is not supported.
        CheckpointError: If a value is missing or has the wrong type.
    """
    raw = config.quantization_config
    if not raw:
        return None
    values = ConfigValues(raw, config.path, "quantization_config.")
    name = raw.get("quant_method")
    if not isinstance(name, str):
        raise values.error("quant_method", f"must be one of {', '.join(METHODS)}", name)
    method = METHODS.get(name.lower().replace("_", "-"))
    if method is None:
        raise UnsupportedModelError(
            f"{config.path}: quantization_config.quant_method {name!r} is not supported; "
            f"{', '.join(METHODS)} are: build from the original checkpoint, which --precision "
            "int8 or int4 quantises",
            key="quantization_config.quant_method",
        )
    ignored = sorted(key for key, value in raw.items() if key not in method.KEYS and value)
    if ignored:
        listed = ", ".join(f"quantization_config.{key}" for key in ignored)
        _LOG.warning("%s: ignored unknown keys: %s", config.path, listed)
    read: Method = method.read(values)
    if read.warnings:
        _LOG.warning(
            "%s: %s of quantization_config left out: weights are taken as stored, activations "
            "and KV cache are not quantised",
            config.path,
            " and ".join(read.warnings),
        )
    return read


def resolve_tensors(config: ModelConfig, stored: StoredTensors) -> ResolvedTensors:
    """Find the plain model's tensors in what a checkpoint stores.

    Zero points and group indices are read and checked; weights are not.

    Args:
        config: The model's config.
        stored: What the files hold.

    Returns:
        The tensors. Those of a plain checkpoint are what is stored.

    Raises:
        UnsupportedModelError: If a weight is stored in a way that is not supported.
        CheckpointError: If a part of a quantised weight is missing, has the wrong shape or type,
            or contradicts the config.
    """
    method = read_method(config)
    tensors = {name: file.tensors[name] for name, file in stored.files.items()}
    if method is None:
        return ResolvedTensors(tensors, {}, ())
    shapes = expected_tensors(config)
    shapes.setdefault(LM_HEAD_NAME, shapes[EMBEDDING_NAME])
    quantized: dict[str, QuantizedWeight] = {}
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        weight = method.weight(name, (shape[0], shape[1]), stored)
        if weight is not None:
            quantized[name] = weight
    used = {part.name for weight in quantized.values() for part in weight.parts}
    for name, weight in quantized.items():
        if name in tensors and name not in used:
            raise CheckpointError(
                f"{name} and {weight.parts[0].name} are both stored, and only one can be the "
                "weight; download the checkpoint again",
                path=tensors[name].file,
            )
    modules = {module_of(name) for name in quantized}
    harmless = [
        name
        for name in tensors
        if name not in used and _is_harmless(Part(name, stored.files[name]), modules, shapes)
    ]
    for name in (*used, *harmless):
        del tensors[name]
    tensors |= {name: weight.info for name, weight in quantized.items()}
    return ResolvedTensors(tensors, quantized, tuple(sorted(harmless)))


def _is_harmless(part: Part, modules: set[str], shapes: Mapping[str, Any]) -> bool:
    """Whether a stored tensor that is no part of a weight can be left out."""
    module, _, kind = part.name.rpartition(".")
    if _SCALES.fullmatch(part.name):
        return True
    if module not in modules:
        return False
    # Checked with the weight, or of no use once a plain matrix is known.
    if kind == "weight_shape" or _GROUP_INDEX.fullmatch(part.name):
        return True
    # GPTQ tools write a bias for every layer they pack, of zeros where the model has none.
    absent_bias = kind == "bias" and part.name not in shapes
    if absent_bias or _FIXED_ZERO.fullmatch(part.name):
        if not np.any(part.read()):
            return True
        info = part.info
        raise CheckpointError(
            f"{part.name} in {info.file.name} must be zero, because the model that config.json "
            "describes has no use for it, but is not; one of the two files is wrong",
            path=info.file,
        )
    return False
