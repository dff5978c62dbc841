"""Rotary positions as config.json describes them: three spellings, and the scaling of each type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.errors import UnsupportedModelError

__all__ = [
    "DynamicScaling",
    "LinearScaling",
    "Llama3Scaling",
    "RopeParameters",
    "RopeScaling",
    "YarnScaling",
    "read_rope",
    "rope_scaling",
]

# These rope types need the trained length; transformers fills it in.
_ROPE_TYPES_WITH_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")
_YARN_BETA_FAST, _YARN_BETA_SLOW = 32.0, 1.0
"""YaRN, arXiv:2309.00071, section 3.2, and the defaults of transformers."""


@dataclass(frozen=True, slots=True)
class RopeParameters:
    """How positions turn into rotations."""

    rope_type: str
    """"default" for plain RoPE; every name is read, `rope_scaling` knows which are supported."""
    rope_theta: float
    """Base of the frequencies, > 0."""
    extra: Mapping[str, Any]
    """The other keys of the mapping as read, with the default of
    original_max_position_embeddings filled in for the types that need it."""
    key: str
    """The config key that names the type, for messages."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by a factor."""

    factor: float
    """> 0."""


@dataclass(frozen=True, slots=True)
class DynamicScaling:
    """NTK scaling that begins where a row exceeds max_position_embeddings."""

    factor: float
    """> 0."""


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN: high frequencies kept, low ones divided by a factor, a ramp between; at any length."""

    factor: float
    """> 0."""
    original_max_position_embeddings: int
    """Tokens the unscaled model was trained for."""
    attention_factor: float
    """Multiplies cosines and sines; > 0."""
    beta_fast: float
    """Rotations over the trained length from which on a frequency is kept; > 0."""
    beta_slow: float
    """Rotations over the trained length up to which a frequency is divided; > 0."""
    truncate: bool
    """Whether the ends of the ramp are rounded to whole dimensions."""


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: short wavelengths kept, long ones divided by a factor, a blend between."""

    factor: float
    """> 0."""
    low_freq_factor: float
    """Wavelengths above original_max_position_embeddings / this are divided; > 0."""
    high_freq_factor: float
    """Wavelengths below original_max_position_embeddings / this are kept; > low_freq_factor."""
    original_max_position_embeddings: int
    """Tokens the unscaled model was trained for."""


RopeScaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling


def read_rope(
    values: ConfigValues, max_position_embeddings: int, layer_types: tuple[str, ...]
) -> tuple[RopeParameters, list[str]]:
    """Merge the spellings of transformers 4 and 5.

    Args:
        values: The config.
        max_position_embeddings: Stands in for a missing original_max_position_embeddings.
        layer_types: Names that make the mapping one for each kind of layer.

    Returns:
        The parameters, and the keys of the mapping that have no effect.

    Raises:
        UnsupportedModelError: If the mapping differs by layer type.
        CheckpointError: If the type or the theta is of the wrong kind.
    """
    source = "rope_scaling" if values.mapping("rope_scaling") else "rope_parameters"
    given = dict(values.mapping(source))
    nested = [key for key in given if key in layer_types]
    if nested:
        raise UnsupportedModelError(
            f"{values.path}: {source} differs by layer type ({', '.join(nested)}), which is not "
            "supported; one rope_type and rope_theta for all layers are",
            key=source,
        )
    # The mapping's own theta wins over the one at top level.
    theta_values = (
        ConfigValues(given, values.path, f"{source}.") if "rope_theta" in given else values
    )
    theta = theta_values.number("rope_theta", 10000.0)
    type_key = "type" if given.get("type") and not given.get("rope_type") else "rope_type"
    rope_type = given.get(type_key) or "default"
    if not isinstance(rope_type, str):
        raise values.error(f"{source}.{type_key}", "must be a string", rope_type)
    if values.raw.get("partial_rotary_factor") is not None:
        given.setdefault("partial_rotary_factor", values.number("partial_rotary_factor", 1.0))
    extra = {k: v for k, v in given.items() if k not in ("rope_type", "type", "rope_theta")}
    if rope_type in _ROPE_TYPES_WITH_ORIGINAL_LENGTH:
        extra.setdefault("original_max_position_embeddings", max_position_embeddings)
    parameters = RopeParameters(rope_type, theta, extra, f"{source}.{type_key}")
    return parameters, [f"{source}.{key}" for key in _unread(rope_type, extra)]


def rope_scaling(
    rope: RopeParameters, *, head_dim: int, max_position_embeddings: int, path: Path
) -> RopeScaling | None:
    """The scaling of a supported rope type, its values checked.

    Args:
        rope: What the config says.
        head_dim: Size of a head, all of which is rotated.
        max_position_embeddings: Gives yarn its factor where that is null.
        path: The config's file, for messages.

    Returns:
        None for plain RoPE.

    Raises:
        UnsupportedModelError: If the type is not supported, or rotates only part of a head.
        CheckpointError: If a value is missing, of the wrong type or out of range.

    Source:
        modeling_rope_utils.py of transformers 5.23.
    """
    source, _, _ = rope.key.rpartition(".")
    if rope.rope_type == "default":
        return None
    if rope.rope_type not in _READERS:
        raise UnsupportedModelError(
            f"{path}: {rope.key} {rope.rope_type!r} is not supported; "
            f"{', '.join(map(repr, ('default', *_READERS)))} are",
            key=rope.key,
        )
    values = ConfigValues(rope.extra, path, f"{source}.")
    part = _optional(values, "partial_rotary_factor")
    if part is not None and int(head_dim * part) != head_dim:
        raise UnsupportedModelError(
            f"{path}: partial_rotary_factor {part:g} with {rope.key} {rope.rope_type!r} is not "
            "supported; Qwen2 and Qwen3 rotate whole heads",
            key="partial_rotary_factor",
        )
    scaling = _READERS[rope.rope_type](values, max_position_embeddings)
    # Their formulas divide by these.
    if isinstance(scaling, DynamicScaling) and head_dim == 2:
        raise UnsupportedModelError(
            f"{path}: {rope.key} 'dynamic' needs a head_dim above 2, got 2", key="head_dim"
        )
    if isinstance(scaling, YarnScaling) and rope.rope_theta == 1:
        raise values.error("rope_theta", "must not be 1 for rope type 'yarn'", rope.rope_theta)
    return scaling


def _linear(values: ConfigValues, _: int) -> LinearScaling:
    return LinearScaling(_required(values, "factor"))


def _dynamic(values: ConfigValues, _: int) -> DynamicScaling:
    return DynamicScaling(_required(values, "factor"))


def _yarn(values: ConfigValues, max_position_embeddings: int) -> YarnScaling:
    original = values.integer("original_max_position_embeddings", max_position_embeddings)
    # null asks for the ratio of the lengths; a missing factor is an error, as in transformers.
    if "factor" in values.raw and values.raw["factor"] is None:
        factor = max_position_embeddings / original
    else:
        factor = _required(values, "factor")
    return YarnScaling(
        factor,
        original,
        _yarn_attention_factor(values, factor),
        _optional(values, "beta_fast") or _YARN_BETA_FAST,
        _optional(values, "beta_slow") or _YARN_BETA_SLOW,
        values.boolean("truncate", True),
    )


def _yarn_attention_factor(values: ConfigValues, factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = _optional(values, "attention_factor")
    mscale = _optional(values, "mscale", zero=True)
    mscale_all_dim = _optional(values, "mscale_all_dim", zero=True)
    if given is not None:
        return given
    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def _llama3(values: ConfigValues, max_position_embeddings: int) -> Llama3Scaling:
    low, high = _required(values, "low_freq_factor"), _required(values, "high_freq_factor")
    if high <= low:
        raise values.error("high_freq_factor", f"must be above low_freq_factor = {low:g}", high)
    return Llama3Scaling(
        _required(values, "factor"),
        low,
        high,
        values.integer("original_max_position_embeddings", max_position_embeddings),
    )


_READERS: dict[str, Callable[[ConfigValues, int], RopeScaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor", "partial_rotary_factor"}),
    "dynamic": frozenset({"factor", "partial_rotary_factor"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "partial_rotary_factor",
        }
    ),
    "llama3": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
            "partial_rotary_factor",
        }
    ),
}


def _unread(rope_type: str, extra: Mapping[str, Any]) -> list[str]:
    """Keys that ask for something and have no effect; those of refused types are not judged."""
    if rope_type not in _KEYS:
        return []
    known = _KEYS[rope_type]
    mscales = ("mscale", "mscale_all_dim")
    if extra.get("attention_factor") is not None or not all(extra.get(key) for key in mscales):
        known = known.difference(mscales)
    return [key for key, value in extra.items() if value is not None and key not in known]


def _required(values: ConfigValues, key: str) -> float:
    number = _optional(values, key)
    if number is None:
        raise values.error(key, "must be a number", None)
    return number


def _optional(values: ConfigValues, key: str, *, zero: bool = False) -> float | None:
    return None if values.raw.get(key) is None else values.number(key, 0.0, zero=zero)
