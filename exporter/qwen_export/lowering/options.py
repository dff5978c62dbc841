"""What a bundle is lowered to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_export.errors import TargetError

__all__ = ["CPU_OPTIONS", "MAX_TOP", "AttentionForm", "ComputeDtype", "LoweringOptions", "Target"]

ComputeDtype = Literal["fp32", "fp16", "bf16"]
AttentionForm = Literal["group_query", "mask"]
Target = Literal["cpu", "cuda"]
"""Providers of ONNX Runtime that a bundle can be lowered for."""
MAX_TOP = 256
"""Beyond, CUDA's TopK leaves a whole row to one block of threads."""
_DTYPES = ("bf16", "fp16", "fp32")
_FORMS = ("group_query", "mask")


@dataclass(frozen=True, slots=True)
class LoweringOptions:
    """Type of the numbers, form of attention, and what a step brings for sampling."""

    compute_dtype: ComputeDtype = "bf16"
    """Type of activations and caches."""
    attention: AttentionForm | None = None
    """"group_query": GroupQueryAttention; "mask": the standard operator under a boolean mask. None
    for what CUDA has a kernel for: the first in 16 bits, the second in fp32."""
    num_top: int = 64
    """For CUDA: how many of a row's highest logits a step brings where they are enough to sample
    from, 0 to `MAX_TOP`; 0 always brings all. Room is needed beside top-k: penalties lower what is
    high."""

    def __post_init__(self) -> None:
        if self.compute_dtype not in _DTYPES:
            raise TargetError(
                f"--compute-dtype must be {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]} for cuda, "
                f"got {self.compute_dtype}",
                names=[str(self.compute_dtype)],
            )
        if self.attention is not None and self.attention not in _FORMS:
            raise TargetError(
                f"attention must be {' or '.join(_FORMS)}, or None for the type's own, got "
                f"{self.attention!r}",
                names=["attention"],
            )
        if type(self.num_top) is not int or not 0 <= self.num_top <= MAX_TOP:
            raise TargetError(
                f"num_top must be an integer in 0..{MAX_TOP}, got {self.num_top!r}",
                names=["num_top"],
            )

    @property
    def form(self) -> AttentionForm:
        """The form of attention."""
        if self.attention is not None:
            return self.attention
        return "mask" if self.compute_dtype == "fp32" else "group_query"

    def command(self, target: Target) -> tuple[str, ...]:
        """The command-line options that ask for it."""
        if target == "cpu":
            return ("--target", target)
        return ("--target", target, "--compute-dtype", self.compute_dtype)


CPU_OPTIONS = LoweringOptions("fp32", "group_query")
"""What the CPU runs: it has no kernels for 16 bits."""
