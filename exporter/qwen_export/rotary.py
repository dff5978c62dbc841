"""Rotary tables, computed exactly as transformers computes its angles."""

from __future__ import annotations

import math
import warnings

import numpy as np
import numpy.typing as npt
import torch

from qwen_export.checkpoint import ModelConfig
from qwen_export.checkpoint.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
)
from qwen_export.errors import UnsupportedModelError

__all__ = ["context_limit", "inverse_frequencies", "rotary_tables"]


def context_limit(config: ModelConfig, requested: int | None) -> int:
    """Longest row of a bundle, in tokens.

    Args:
        config: A supported configuration.
        requested: What was asked for, at least 1; None for max_position_embeddings. More than
            that is a warning: the angles exist, but the model was not made for them.

    Raises:
        UnsupportedModelError: If the rope type is "dynamic" and more than max_position_embeddings
            is asked for.
    """
    trained = config.max_position_embeddings
    if requested is None:
        return trained
    _require_fixed_angles(config, requested)
    if requested > trained:
        warnings.warn(
            f"--max-context {requested} is more than the max_position_embeddings {trained} of "
            f"{config.path}: the bundle can run rows that long, but the model was not made for "
            "them",
            stacklevel=3,
        )
    return requested


def rotary_tables(
    config: ModelConfig, max_context: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosine and sine of every angle, times the attention factor of the rope type.

    Args:
        config: Gives head_dim D and the rope parameters.
        max_context: Positions, counted from 0.

    Returns:
        Two tables [max_context, D/2] float32.

    Raises:
        UnsupportedModelError: If the rope type is not supported, or is "dynamic" and max_context
            exceeds max_position_embeddings.
        CheckpointError: If a value of the rope mapping is missing, wrong or out of range.

    Source:
        RoFormer, arXiv:2104.09864; bit-equal to Qwen2RotaryEmbedding of transformers in fp32.
    """
    _require_fixed_angles(config, max_context)
    frequencies, factor = inverse_frequencies(config)
    angles = torch.arange(max_context, dtype=torch.float32)[:, None] * frequencies[None, :]
    return (angles.cos() * factor).numpy(), (angles.sin() * factor).numpy()


def inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Radians per token of every pair, and what cosines and sines are multiplied by.

    Args:
        config: Gives head_dim D, max_position_embeddings and the rope parameters.

    Returns:
        [D/2] float32, highest frequency first, and the attention factor, 1 for most types. For
        "dynamic" they hold up to max_position_embeddings.

    Source:
        ROPE_INIT_FUNCTIONS of transformers 5.23, operation by operation: the order of roundings
        decides the last bit.
    """
    head_dim, theta = config.head_dim, config.rope.rope_theta
    scaling = config.rope_scaling()
    if isinstance(scaling, DynamicScaling):
        trained, factor = config.max_position_embeddings, scaling.factor
        # One, but for its rounding: the growth of a row of just the trained length.
        growth = (factor * trained / trained) - (factor - 1)
        theta *= growth ** (head_dim / (head_dim - 2))
    wavelengths = theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    frequencies = 1.0 / wavelengths
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor, 1.0
    if isinstance(scaling, YarnScaling):
        divided = 1.0 / (scaling.factor * wavelengths)
        kept = 1 - _yarn_ramp(scaling, head_dim, theta)
        return divided * (1 - kept) + frequencies * kept, scaling.attention_factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(scaling, frequencies), 1.0
    return frequencies, 1.0


def _yarn_ramp(scaling: YarnScaling, head_dim: int, theta: float) -> torch.Tensor:
    """How far each frequency is divided, [D/2]: 0 for the fast ones, 1 for the slow ones.

    Source:
        YaRN, arXiv:2309.00071, section 3.2.
    """

    def dimension(rotations: float) -> float:
        """The dimension that turns so often over the trained length."""
        length = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (head_dim * math.log(length)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    return ramp.clamp(0, 1)


def _llama3(scaling: Llama3Scaling, frequencies: torch.Tensor) -> torch.Tensor:
    """Frequencies [D/2] by their wavelength: kept, blended or divided.

    Source:
        Llama 3.1, arXiv:2407.21783; `apply_scaling` of its reference code.
    """
    length = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    blend = (length / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow, fast = wavelengths > length / low, wavelengths < length / high
    return torch.where(slow, frequencies / scaling.factor, torch.where(fast, frequencies, blended))


def _require_fixed_angles(config: ModelConfig, max_context: int) -> None:
    trained = config.max_position_embeddings
    if isinstance(config.rope_scaling(), DynamicScaling) and max_context > trained:
        raise UnsupportedModelError(
            f"{config.path}: --max-context must be at most max_position_embeddings = {trained} "
            f"for rope type 'dynamic', whose angles beyond it depend on the longest row so far, "
            f"got {max_context}",
            key="max_context",
        )
