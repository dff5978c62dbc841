"""What `build` adds to a bundle for targets, with default options.

A graph for the CPU belongs to every bundle of quantised weights and is verified with it; what a GPU
runs is added to the finished bundle where it was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from qwen_export.errors import OptionError, TargetError
from qwen_export.lowering.folder import TARGETS as LOWERED_TARGETS
from qwen_export.lowering.folder import lower_bundle, require_codes
from qwen_export.lowering.options import ComputeDtype, LoweringOptions
from qwen_export.progress import Progress, no_progress
from qwen_export.targets.engine import build_engine, check_target
from qwen_export.targets.options import EngineOptions
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_file import lowered_names

__all__ = [
    "COMPUTE_DTYPES",
    "CPU",
    "add_cpu_graph",
    "add_target",
    "check_precision",
    "check_targets",
]

COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)
"""Types that some target computes in; the portable graphs compute in the first."""
CPU = "cpu"
"""The target that every bundle of quantised weights is built for."""


def check_targets(targets: Sequence[str], compute_dtype: str | None) -> None:
    """Refuse targets, and a type that one of them does not compute in, before anything is built.

    Args:
        targets: "cpu", "cuda", "tensorrt-rtx", "tensorrt"; none for the portable bundle alone.
        compute_dtype: What those of a GPU compute in; None for bf16, the default of each.

    Raises:
        OptionError: If the type is not known, or is asked for without a GPU target.
        TargetError: If a target is unknown, not installed, or does not compute in the type.
    """
    if compute_dtype is not None and compute_dtype not in COMPUTE_DTYPES:
        raise OptionError(
            f"--compute-dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {compute_dtype}"
        )
    on_gpu = [target for target in targets if target != CPU]
    if not on_gpu and compute_dtype not in (None, "fp32"):
        raise OptionError(
            f"--compute-dtype {compute_dtype} needs a --target, the GPU engine that computes in "
            "it: the bundle's graphs for a CPU compute in fp32, because a CPU has no kernels for "
            "bf16 and runs fp16 through casts"
        )
    for target in on_gpu:
        if target in LOWERED_TARGETS:
            _lowering_options(compute_dtype)
        else:
            check_target(target, _engine_options(compute_dtype))


def check_precision(targets: Sequence[str], precision: str, output: Path) -> None:
    """Refuse targets that do not take a format of weights, before anything is built.

    Args:
        targets: As in `check_targets`.
        precision: "fp32", "int8" or "int4".
        output: The bundle's folder.

    Raises:
        TargetError: If one of them is "cpu", and the weights are floats.
    """
    if CPU in targets:
        require_codes(output, precision)


def add_cpu_graph(bundle: Bundle, *, progress: Progress = no_progress) -> TargetError | None:
    """Put the graph for the CPU into a bundle of int8 or int4 weights.

    Args:
        bundle: A bundle that is not verified yet.
        progress: Where to report long steps.

    Returns:
        Why it has none, where its operators do not take the model; None where it has one.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        lower_bundle(bundle, CPU, progress=progress)
    except TargetError as error:
        return error
    return None


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
        target: "cpu", which it may have already, or "cuda" for graphs of ONNX Runtime's providers,
            "tensorrt-rtx" or "tensorrt" for an engine.
        compute_dtype: What it computes in; None for the target's default.
        progress: Where to report long steps.

    Raises:
        TargetError: If the target cannot take the bundle.
        OutputError: If it cannot be written.
    """
    if target == CPU:
        if CPU not in lowered_names(bundle.path):
            lower_bundle(bundle, CPU, progress=progress)
    elif target in LOWERED_TARGETS:
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
