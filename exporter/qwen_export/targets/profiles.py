"""Optimisation profiles: which sizes an engine is built for.

A profile names dimensions, not inputs, so that two inputs of one profile cannot disagree about
the same dimension. The builder checks nothing of what is checked here: it builds an engine that
corrupts its cache, or one that holds every weight twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qwen_export.errors import TargetError

__all__ = ["Profile", "ProfileShapes", "SizeRange", "check_profiles", "profile_shapes"]

ProfileShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Per input: its smallest, optimal and largest shape."""


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Sizes one dimension may take."""

    min: int
    opt: int
    """The size kernels are chosen for."""
    max: int

    def __post_init__(self) -> None:
        sizes = (self.min, self.opt, self.max)
        whole = all(type(size) is int for size in sizes)
        if not whole or not 1 <= self.min <= self.opt <= self.max:
            raise TargetError(f"a size range must satisfy 1 <= min <= opt <= max, got {sizes}")


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimisation profile of an engine."""

    name: str
    """"prefill", "decode": for messages and the engine's description."""
    sizes: Mapping[str, SizeRange]
    """By dimension name: "batch", and for the prefill graph "sequence" and "num_logits"."""

    @classmethod
    def prefill(cls, batch: SizeRange, sequence: SizeRange, num_logits: SizeRange) -> Profile:
        """Many new tokens per row."""
        return cls("prefill", {"batch": batch, "sequence": sequence, "num_logits": num_logits})

    @classmethod
    def decode(cls, batch: SizeRange) -> Profile:
        """One new token per row, on the prefill graph."""
        one = SizeRange(1, 1, 1)
        return cls("decode", {"batch": batch, "sequence": one, "num_logits": one})


def check_profiles(profiles: Sequence[Profile], graph: ir.Graph) -> None:
    """Refuse profiles that the graph cannot honour or that build a bad engine.

    Args:
        profiles: In the order the engine will number them.
        graph: A graph whose capacity is fixed.

    Raises:
        TargetError: Naming the profile and the dimension at fault.
    """
    names = [profile.name for profile in profiles]
    if not names or len(set(names)) != len(names):
        raise TargetError(
            f"an engine needs at least one profile, each with its own name, got {names}",
            names=names,
        )
    wanted, capacity = _dimensions(graph), _capacity(graph)
    for profile in profiles:
        _check_names(profile, wanted)
        _check_sizes(profile, capacity)
        # A vector times a matrix wants its weights in another layout than every other product.
        if len(profiles) > 1 and _is_pinned(profile):
            raise TargetError(
                f"profile {profile.name!r}: batch must reach 2; beside another profile, one that "
                "is pinned to a single row of a single token makes the engine store the weights "
                "of every linear layer twice",
                names=["batch"],
            )


def profile_shapes(profile: Profile, inputs: Sequence[ir.Value]) -> ProfileShapes:
    """The shapes a profile gives to every input.

    Args:
        profile: A profile that `check_profiles` accepted.
        inputs: The graph's inputs.
    """
    return {
        str(value.name): (
            _shape(profile, value, "min"),
            _shape(profile, value, "opt"),
            _shape(profile, value, "max"),
        )
        for value in inputs
    }


def _shape(profile: Profile, value: ir.Value, bound: str) -> tuple[int, ...]:
    return tuple(
        getattr(profile.sizes[str(dim.value)], bound) if isinstance(dim, ir.SymbolicDim) else dim
        for dim in value.shape or ()
    )


def _dimensions(graph: ir.Graph) -> list[str]:
    """Names of the inputs' dynamic dimensions, in order of appearance."""
    dims = [dim for value in graph.inputs for dim in value.shape or ()]
    return list(dict.fromkeys(str(dim.value) for dim in dims if isinstance(dim, ir.SymbolicDim)))


def _capacity(graph: ir.Graph) -> int:
    """Slots of the caches, the inputs that are [batch, kv_heads, capacity, head_dim]."""
    sizes = {value.shape[2] for value in graph.inputs if value.shape and len(value.shape) == 4}
    first = next(iter(sizes), None)
    if len(sizes) != 1 or not isinstance(first, int):
        raise TargetError(
            "every cache must have the same fixed capacity before an engine is built, got "
            f"{', '.join(sorted(map(str, sizes))) or 'no cache'}",
            names=["capacity"],
        )
    return first


def _check_names(profile: Profile, wanted: list[str]) -> None:
    wrong = sorted(set(wanted) ^ profile.sizes.keys())
    if wrong:
        raise TargetError(
            f"profile {profile.name!r} must give a size range to {', '.join(wanted)}, the graph's "
            f"dynamic dimensions, got {', '.join(profile.sizes) or 'none'}",
            names=wrong,
        )


def _is_pinned(profile: Profile) -> bool:
    tokens = profile.sizes["sequence"].max if "sequence" in profile.sizes else 1
    return profile.sizes["batch"].max * tokens == 1


def _check_sizes(profile: Profile, capacity: int) -> None:
    one = SizeRange(1, 1, 1)
    sequence = profile.sizes.get("sequence", one)
    num_logits = profile.sizes.get("num_logits", one)
    if sequence.max > capacity:
        raise TargetError(
            f"profile {profile.name!r}: sequence must not exceed the capacity of {capacity} "
            f"tokens, got up to {sequence.max}; lower it or raise the capacity",
            names=["sequence"],
        )
    for bound in ("min", "opt", "max"):
        tokens, logits = getattr(sequence, bound), getattr(num_logits, bound)
        if logits > tokens:
            raise TargetError(
                f"profile {profile.name!r}: num_logits must not exceed sequence, got {logits} of "
                f"{tokens} tokens as {bound}",
                names=["num_logits"],
            )
