"""What a bundle is lowered to for CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_export.errors import TargetError

__all__ = ["AttentionForm", "ComputeDtype", "LoweringOptions"]

ComputeDtype = Literal["fp32", "fp16", "bf16"]
AttentionForm = Literal["group_query", "mask"]
_DTYPES = ("bf16", "fp16", "fp32")
_FORMS = ("group_query", "mask")


@dataclass(frozen=True, slots=True)
class LoweringOptions:
    """Type of the numbers, and form of attention."""

    compute_dtype: ComputeDtype = "bf16"
    """Type of activations and caches."""
    attention: AttentionForm | None = None
    """"group_query": GroupQueryAttention; "mask": the standard operator under a boolean mask. None
    for what CUDA has a kernel for: the first in 16 bits, the second in fp32."""

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

    @property
    def form(self) -> AttentionForm:
        """The form of attention."""
        if self.attention is not None:
            return self.attention
        return "mask" if self.compute_dtype == "fp32" else "group_query"

    @property
    def command(self) -> tuple[str, ...]:
        """The command-line options that ask for it."""
        return ("--target", "cuda", "--compute-dtype", self.compute_dtype)
