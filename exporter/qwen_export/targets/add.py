"""What `build` adds to a finished bundle for the targets it was asked for, with default options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args

from qwen_export.errors import OptionError
from qwen_export.lowering.folder import TARGETS as LOWERED_TARGETS
from qwen_export.lowering.folder import lower_bundle
from qwen_export.lowering.options import ComputeDtype, LoweringOptions
from qwen_export.progress import Progress, no_progress
from qwen_export.targets.engine import build_engine, check_target
from qwen_export.targets.options import EngineOptions
from qwen_runtime.bundle import Bundle

__all__ = ["COMPUTE_DTYPES", "add_target", "check_targets"]

COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)
"""Types that some target computes in; the portable graphs compute in the first."""


def check_targets(targets: Sequence[str], compute_dtype: str | None) -> None:
    """Refuse targets, and a type that one of them does not compute in, before anything is built.

    Args:
        targets: "cuda", "tensorrt-rtx", "tensorrt"; none for the portable bundle alone.
        compute_dtype: What they compute in; None for bf16, the default of each.

    Raises:
        OptionError: If the type is not known, or is asked for without a target.
        TargetError: If a target is unknown, not installed, or does not compute in the type.
    """
    if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
        raise OptionError(
            f"--compute-dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {compute_dtype}"
        )
    if not targets and compute_dtype not in (None, "fp32"):
        raise OptionError(
            f"--compute-dtype {compute_dtype} needs a --target, the GPU engine that computes in "
            "it: the bundle's portable graphs compute in fp32, because a CPU has no kernels for "
            "bf16 and runs fp16 through casts"
        )
    for target in targets:
        if target in LOWERED_TARGETS:
            _lowering_options(compute_dtype)
        else:
            check_target(target, _engine_options(compute_dtype))


def add_target(
    bundle: Bundle,
    target: str,
    compute_dtype: str | None = None,
    *,
    progress: Progress = no_progress,
) -> None:
    """Put what a target needs into a bundle.

    Args:
        bundle: A complete bundle.
        target: "cuda" for graphs of ONNX Runtime's CUDA provider, "tensorrt-rtx" or "tensorrt" for
            an engine.
        compute_dtype: What it computes in; None for the target's default.
        progress: Where to report long steps.

    Raises:
        TargetError: If the target cannot take the bundle.
        OutputError: If it cannot be written.
    """
    if target in LOWERED_TARGETS:
        lower_bundle(bundle, target, _lowering_options(compute_dtype), progress=progress)
    else:
        build_engine(bundle, target, _engine_options(compute_dtype), progress=progress)


def _lowering_options(compute_dtype: str | None) -> LoweringOptions:
    return LoweringOptions() if compute_dtype is None else LoweringOptions(_any(compute_dtype))


def _engine_options(compute_dtype: str | None) -> EngineOptions:
    return EngineOptions() if compute_dtype is None else EngineOptions(_any(compute_dtype))


def _any(compute_dtype: str) -> Any:
    """A type's name that the options check themselves."""
    return cast("Any", compute_dtype)
