"""What an engine is built for: its numbers' type, its limits, its GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_export.errors import TargetError
from qwen_export.targets.profiles import Profile, SizeRange
from qwen_runtime.engine_description import Phase
from qwen_runtime.manifest import Manifest

__all__ = ["EngineOptions", "EngineSizes"]

DEFAULT_CAPACITY = 4096
"""Slots per row, in tokens, where the context allows more: caches and the scratch memory of
prefill grow with it."""
DEFAULT_SEQUENCE = 1024
"""New tokens of a row in one call; longer prompts are run in chunks."""
MAX_NUM_LOGITS = 32
"""Positions whose logits one call returns: a vocabulary of float32 each. More are asked for in
several calls."""
_OPT_SEQUENCE = 256

ComputeDtype = Literal["bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """The limits of an engine, all known."""

    max_batch: int
    max_sequence: int
    capacity: int

    @property
    def max_num_logits(self) -> int:
        """Positions per row whose logits one prefill call returns."""
        return min(MAX_NUM_LOGITS, self.max_sequence)

    def profiles(self, phases: Sequence[Phase], graph: Phase) -> list[Profile]:
        """The profiles of an engine that serves some phases from one graph."""
        batch = SizeRange(1, 1, self.max_batch)
        if graph == "decode":
            return [Profile("decode", {"batch": batch})]
        sequence = SizeRange(1, min(_OPT_SEQUENCE, self.max_sequence), self.max_sequence)
        prefill = Profile.prefill(batch, sequence, SizeRange(1, 1, self.max_num_logits))
        return [prefill if phase == "prefill" else Profile.decode(batch) for phase in phases]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What `build_engine` is asked for."""

    compute_dtype: ComputeDtype = "bf16"
    """Type of activations and caches."""
    max_batch: int = 8
    """Rows of one call."""
    max_sequence: int | None = None
    """New tokens per row of one prefill call; None for 1,024, or the capacity where that is less."""
    capacity: int | None = None
    """Slots of a cache row, in tokens; None for 4,096, or the bundle's context where that is less."""
    sms: tuple[int, ...] | None = None
    """GPU generations, 89 for compute capability 8.9; None for all that the target knows."""
    separate: bool = False
    """An engine for each graph, with weights of its own, instead of one with two profiles."""

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("bf16", "fp16"):
            raise TargetError(
                f"--compute-dtype must be bf16 or fp16, got {self.compute_dtype}: TensorRT has no "
                "float32 attention kernel",
                names=[self.compute_dtype],
            )
        _require_count("--max-batch", self.max_batch)
        _require_count("--max-sequence", self.max_sequence)
        _require_count("--capacity", self.capacity)
        for sm in self.sms or ():
            _require_count("--sms", sm)

    def sizes(self, manifest: Manifest) -> EngineSizes:
        """The limits for a bundle, with their defaults.

        Raises:
            TargetError: If they contradict the bundle or each other.
        """
        limit = manifest.max_context
        capacity = min(DEFAULT_CAPACITY, limit) if self.capacity is None else self.capacity
        if capacity > limit:
            raise TargetError(
                f"--capacity must not exceed the bundle's context of {limit} tokens, got "
                f"{capacity}; lower it, or build the bundle with a larger --max-context",
                names=["capacity"],
            )
        sequence = self.max_sequence
        if sequence is None:
            sequence = min(DEFAULT_SEQUENCE, capacity)
        if sequence > capacity:
            raise TargetError(
                f"--max-sequence must not exceed the capacity of {capacity} tokens, got "
                f"{sequence}; lower it or raise --capacity",
                names=["sequence"],
            )
        if self.max_batch == 1 and not self.separate:
            raise TargetError(
                "--max-batch must be at least 2, got 1: an engine with a profile for prefill and "
                "one pinned to a single row stores its weights twice. A single row runs with "
                "--max-batch 2 as well; --separate-engines takes 1",
                names=["batch"],
            )
        return EngineSizes(self.max_batch, sequence, capacity)

    def command(
        self, target: str, sizes: EngineSizes, sms: Sequence[int] | None
    ) -> tuple[str, ...]:
        """The command-line options that ask for the same engine; ``sms`` None for none."""
        return (
            *("--target", target),
            *("--compute-dtype", self.compute_dtype),
            *("--max-batch", str(sizes.max_batch)),
            *("--max-sequence", str(sizes.max_sequence)),
            *("--capacity", str(sizes.capacity)),
            *(("--sms", ",".join(map(str, sms))) if sms is not None else ()),
            *(("--separate-engines",) if self.separate else ()),
        )


def _require_count(option: str, value: object) -> None:
    if value is not None and (type(value) is not int or value < 1):
        raise TargetError(f"{option} must be a whole number of at least 1, got {value!r}")
