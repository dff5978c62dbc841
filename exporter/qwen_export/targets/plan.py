"""A built engine and what is known about it without a GPU."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from qwen_export.errors import TargetError
from qwen_export.targets.network import NetworkFacts

__all__ = ["Kernel", "Plan", "PlanHeader"]

_MAGIC = b"vtrt"
# Where the header of TensorRT-RTX 1.7 keeps what is read here; not documented by NVIDIA.
_SIZE = 64
_FORMAT = 2
_SM_BITS = {0: 75, 1: 80, 2: 86, 3: 89, 4: 120, 5: 121}


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """The first 64 bytes of a TensorRT-RTX plan."""

    version: tuple[int, int, int, int]
    """The only release that runs the plan."""
    sms: tuple[int, ...]
    """GPU generations it was compiled for: 89 is compute capability 8.9."""
    num_bytes: int
    """Size of the whole plan."""
    weight_bytes: int
    """Size of the weights in it."""

    @classmethod
    def read(cls, plan: bytes | memoryview) -> PlanHeader:
        """Read the header of a plan.

        Raises:
            TargetError: If this is no TensorRT-RTX plan, one of an unknown format, or cut short.
        """
        if len(plan) < _SIZE or plan[:4] != _MAGIC or plan[28:32] != _MAGIC:
            raise TargetError("the plan must begin with TensorRT-RTX's header, but does not")
        (layout,) = struct.unpack_from("<I", plan, 8)
        if layout != _FORMAT:
            raise TargetError(f"the plan's header must have format {_FORMAT}, got {layout}")
        (num_bytes,) = struct.unpack_from("<Q", plan, 16)
        if num_bytes != len(plan):
            raise TargetError(f"the plan must have {num_bytes} bytes, got {len(plan)}")
        (mask,) = struct.unpack_from("<I", plan, 32)
        (weight_bytes,) = struct.unpack_from("<Q", plan, 56)
        major, minor, patch, build = plan[24:28]
        sms = tuple(sm for bit, sm in _SM_BITS.items() if mask >> bit & 1)
        return cls((major, minor, patch, build), sms, num_bytes, weight_bytes)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One step of the engine as the builder reports it."""

    name: str
    kind: str
    """"gemm", "kgen", "runtime_fusion", ..."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A serialised engine."""

    data: memoryview
    """Its bytes, where TensorRT keeps them."""
    header: PlanHeader | None
    """What a plan of TensorRT-RTX begins with; None for the enterprise TensorRT's."""
    weight_bytes: int | None
    """Size of the weights in it, from its header or as the builder reported it."""
    network: NetworkFacts
    """What the parser made of the graph."""
    graph_weight_bytes: int
    """Size of the weights that were handed over, each counted once."""
    activation_bytes: tuple[int, ...]
    """Scratch memory of each profile."""
    kernels: tuple[Kernel, ...]
    """Profile after profile, in order of execution."""
    warnings: tuple[str, ...]
    """What the builder warned of and does not change numbers."""
