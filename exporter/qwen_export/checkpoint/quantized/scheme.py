"""Which modules a compressed-tensors config quantises, and how.

Source:
    compressed-tensors ``QuantizationConfig``, ``QuantizationArgs`` and ``match_targets``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.checkpoint.quantized.method import block_of, module_of, refused

__all__ = ["ModuleGroup", "WeightScheme", "match_rank", "read_groups", "read_targets"]

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
)
_STRATEGIES = ("tensor", "channel", "group", "block")
_REGEX = "re:"
_LM_HEAD, _EMBEDDING = "lm_head", "model.embed_tokens"
_WEIGHT_KEYS = (
    "actorder",
    "block_structure",
    "dynamic",
    "group_size",
    "num_bits",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "strategy",
    "symmetric",
    "type",
    "zp_dtype",
)


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """How the weights of one group of modules are stored."""

    packed: bool
    """Whether codes are packed into int32 (weight_packed) or stored one a byte (weight)."""
    kind: Literal["int", "float"]
    bits: int
    symmetric: bool
    strategy: str
    """What shares a scale: "tensor", "channel" (a row), "group" (of a row) or "block"."""
    group_size: int | None
    """Of strategy "group"."""
    block: tuple[int, int] | None
    """Outputs and inputs of strategy "block"."""


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """An entry of config_groups."""

    targets: tuple[str, ...]
    """Module names, "re:" and a pattern, or class names ("Linear")."""
    weights: WeightScheme | None
    """None where only activations are quantised."""
    activations: bool
    """Whether inputs or outputs are quantised too."""


def read_groups(values: ConfigValues) -> tuple[ModuleGroup, ...]:
    """Read config_groups.

    Args:
        values: quantization_config.

    Returns:
        The groups, in order.

    Raises:
        UnsupportedModelError: If a group asks for something that is not supported.
        CheckpointError: If a value has the wrong type.
    """
    default = values.raw.get("format")
    groups = values.mapping("config_groups")
    if not groups:
        raise values.error("config_groups", "must name at least one group of modules", groups)
    read = []
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise values.error(f"config_groups.{name}", "must be an object", group)
        inner = ConfigValues(group, values.path, f"{values.prefix}config_groups.{name}.")
        read.append(
            ModuleGroup(
                read_targets(inner, "targets"),
                _weight_scheme(inner, inner.raw.get("format") or default),
                bool(inner.raw.get("input_activations") or inner.raw.get("output_activations")),
            )
        )
    return tuple(read)


def read_targets(values: ConfigValues, key: str) -> tuple[str, ...]:
    """Read a list of targets; null and a missing key are empty.

    Raises:
        CheckpointError: If it is no list of strings, or a pattern in it is not valid.
    """
    targets = values.raw.get(key)
    if targets is None:
        return ()
    if not isinstance(targets, list) or not all(isinstance(each, str) for each in targets):
        raise values.error(key, "must be a list of module names", targets)
    for target in targets:
        try:
            re.compile(target.removeprefix(_REGEX) if target.startswith(_REGEX) else "")
        except re.error as error:
            raise values.error(key, f"must hold valid patterns ({error})", target) from error
    return tuple(targets)


def match_rank(name: str, target: str) -> int | None:
    """How closely a target means a weight's module.

    Args:
        name: The weight.
        target: A module's name, "re:" and a pattern for its start, or a class.

    Returns:
        0 for its name, 1 for a pattern, 2 for its class; None where it means another module.
    """
    module = module_of(name)
    if target == module:
        return 0
    if target.startswith(_REGEX):
        return 1 if re.match(target.removeprefix(_REGEX), module) else None
    return 2 if target == ("Embedding" if module == _EMBEDDING else "Linear") else None


def _weight_scheme(group: ConfigValues, storage: object) -> WeightScheme | None:
    weights = group.mapping("weights")
    if not weights:
        return None
    if storage not in _FORMATS:
        raise refused(group, "format", storage, [repr(each) for each in _FORMATS])
    values = ConfigValues(weights, group.path, f"{group.prefix}weights.")
    for key in weights:
        if key not in _WEIGHT_KEYS:
            raise refused(values, key, weights[key], [", ".join(_WEIGHT_KEYS)])
    kind = values.text("type", "int")
    bits = values.integer("num_bits", 8)
    strategy, group_size = _strategy(values)
    symmetric = values.boolean("symmetric", True)
    if kind == "float":
        if bits != 8 or not symmetric:
            what = f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'} float"
            raise refused(values, "type", what, ["8-bit symmetric float"])
        return WeightScheme(
            False, "float", bits, symmetric, strategy, group_size, _block(values, strategy)
        )
    if kind != "int":
        raise refused(values, "type", kind, ["'int'", "'float'"])
    if bits not in (4, 8):
        raise refused(values, "num_bits", bits, [4, 8])
    if strategy == "block":
        raise refused(values, "strategy", "block", ["'tensor'", "'channel'", "'group'"])
    if storage == "float-quantized":
        raise refused(values, "type", kind, ["'float' in float-quantized"])
    packed = storage == "pack-quantized"
    return WeightScheme(packed, "int", bits, symmetric, strategy, group_size, None)


def _strategy(values: ConfigValues) -> tuple[str, int | None]:
    """The strategy, inferred from group_size where missing, and the group's size."""
    size = values.raw.get("group_size")
    if size == -1:
        size = None
        inferred = "channel"
    else:
        inferred = "tensor" if size is None else "group"
    strategy = values.text("strategy", inferred) if values.raw.get("strategy") else inferred
    if strategy not in _STRATEGIES:
        raise refused(values, "strategy", strategy, [repr(each) for each in _STRATEGIES])
    if strategy == "group":
        return strategy, values.integer("group_size", 0)
    if size is not None:
        raise values.error("group_size", f"must be null with strategy {strategy!r}", size)
    return strategy, None


def _block(values: ConfigValues, strategy: str) -> tuple[int, int] | None:
    if strategy != "block":
        return None
    return block_of(values, "block_structure")
