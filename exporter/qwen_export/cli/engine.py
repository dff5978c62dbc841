"""``qwen-export engine``. Heavy imports wait until the command runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from qwen_export.errors import ExportError
from qwen_runtime.cli.support import json_option, print_json, reports
from qwen_runtime.errors import QwenRuntimeError

if TYPE_CHECKING:
    from qwen_runtime.bundle import Bundle
    from qwen_runtime.engine_file import EngineFolder
    from qwen_runtime.lowered_file import LoweredFolder

__all__ = ["engine", "show_target", "target_option"]

_POSITIVE = click.IntRange(min=1)
_TARGETS = ["tensorrt-rtx", "tensorrt", "cuda", "cpu"]
_LOWERED = ("cuda", "cpu")
"""Targets whose graphs ONNX Runtime runs."""
_ENGINE_ONLY = ("max_batch", "max_sequence", "capacity", "sms", "separate_engines")
"""Options that ONNX Runtime has no use for: its graphs take any sizes."""
TARGET_HELP = (
    "tensorrt-rtx builds an engine without a GPU; tensorrt, the enterprise one, builds for the GPU "
    "at hand, is experimental and was never executed; cuda writes graphs for ONNX Runtime's CUDA "
    "provider; cpu writes the graph that int8 and int4 bundles are served with on the CPU, which "
    "build makes anyway. May be given more than once."
)

target_option = click.option(
    "--target",
    "targets",
    type=click.Choice(_TARGETS),
    multiple=True,
    help=f"Build this into the bundle as well: {TARGET_HELP}",
)


def _generations(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Read numbers with commas between them."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"must be whole numbers with commas between them, such as 86,89, got {value!r}",
            context,
            parameter,
        ) from None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    "targets",
    type=click.Choice(_TARGETS),
    multiple=True,
    required=True,
    help=f"What to build with: {TARGET_HELP}",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Type of activations and caches on a GPU. fp16 is refused where the model's numbers exceed "
    "it, fp32 is for cuda only.",
)
@click.option(
    "--max-batch", type=_POSITIVE, default=8, show_default=True, help="Rows of one call."
)
@click.option(
    "--max-sequence",
    type=_POSITIVE,
    metavar="N",
    help="New tokens per row of one prefill call; longer prompts run in chunks.  "
    "[default: 1024, or the capacity]",
)
@click.option(
    "--capacity",
    type=_POSITIVE,
    metavar="N",
    help="Slots of a cache row, in tokens: the longest row it serves.  "
    "[default: 4096, or the bundle's context]",
)
@click.option(
    "--sms",
    metavar="N,N…",
    callback=_generations,
    help="GPU generations to build for: 89 is compute capability 8.9.  "
    "[default: 80,86,89,120,121]",
)
@click.option(
    "--separate-engines",
    is_flag=True,
    help="An engine for each graph, with weights of its own, instead of one with two profiles.",
)
@click.option("--overwrite", is_flag=True, help="Replace what the bundle has for the target.")
@json_option
@reports(ExportError, QwenRuntimeError, extra="export")
def engine(
    bundle: Path,
    targets: tuple[str, ...],
    compute_dtype: Literal["bf16", "fp16", "fp32"],
    max_batch: int,
    max_sequence: int | None,
    capacity: int | None,
    sms: tuple[int, ...] | None,
    separate_engines: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Build into BUNDLE what an engine runs best: a TensorRT plan, or graphs for ONNX Runtime.

    TensorRT's own parser and builder make an engine at engines/TARGET; it is refused where it would
    give wrong numbers. The target cuda writes rewritten graphs over the bundle's weights to
    lowered/cuda; only --compute-dtype matters to it. Nothing is executed: both are proved on the
    GPU that loads them. The target cpu writes lowered/cpu again, which serves int8 and int4
    bundles on the CPU; it takes no options, and qwen-run check proves it.

    \b
    Examples:
      qwen-export engine artifacts/tiny-qwen2-chat --target tensorrt-rtx
      qwen-export engine artifacts/qwen --target tensorrt-rtx --max-batch 32 --capacity 8192
      qwen-export engine artifacts/qwen --target cuda --compute-dtype fp16
      qwen-export engine artifacts/qwen-int4 --target cpu --overwrite
    """
    from qwen_export.progress import console_progress
    from qwen_export.targets.engine import build_engine, check_target
    from qwen_export.targets.options import EngineOptions
    from qwen_runtime.bundle import Bundle

    wanted = tuple(dict.fromkeys(targets))
    engines = [target for target in wanted if target not in _LOWERED]
    if wanted == ("cpu",):
        _refuse_given(
            (*_ENGINE_ONLY, "compute_dtype"),
            "--target cpu, whose graph takes any sizes and computes in fp32",
        )
    elif not engines:
        _refuse_given(_ENGINE_ONLY, "--target cuda, whose graphs take any sizes on any GPU")
    elif compute_dtype == "fp32":
        raise click.UsageError(
            f"--compute-dtype must be bf16 or fp16 for {engines[0]}, got fp32: TensorRT has no "
            "float32 attention kernel"
        )
    opened = Bundle.open(bundle)
    options = None
    if compute_dtype != "fp32":
        options = EngineOptions(
            compute_dtype, max_batch, max_sequence, capacity, sms, separate_engines
        )
        for target in engines:
            check_target(target, options)
    built: dict[str, dict[str, object]] = {}
    for target in wanted:
        started = time.monotonic()
        made: EngineFolder | LoweredFolder
        if target in _LOWERED:
            made = _lower(opened, target, compute_dtype, overwrite=overwrite)
        else:
            made = build_engine(
                opened, target, options, overwrite=overwrite, progress=console_progress
            )
        built[target] = asdict(made.description) | {"path": str(made.path)}
        if not as_json:
            show_target(opened, target, f"; {time.monotonic() - started:.0f} s")
    if as_json:
        print_json({"bundle": str(bundle), "engines": built})


def show_target(bundle: Bundle, target: str, more: str = "") -> None:
    """Print one line on what a bundle has for a target, and a builder's warnings to stderr."""
    from qwen_export.inspection import engine_line, lowered_line
    from qwen_runtime.engine_file import EngineFolder
    from qwen_runtime.lowered_file import LoweredFolder

    if target in _LOWERED:
        lowered = LoweredFolder.open(bundle, target)
        click.echo(f"{lowered.path}: {lowered_line(lowered)}{more}")
        return
    made = EngineFolder.open(bundle, target)
    click.echo(f"{made.path}: {engine_line(made)}{more}")
    for warning in made.description.warnings:
        click.echo(f"Warning: {warning}", err=True)


def _lower(
    bundle: Bundle,
    target: str,
    compute_dtype: Literal["bf16", "fp16", "fp32"],
    *,
    overwrite: bool,
) -> LoweredFolder:
    from qwen_export.lowering import LoweringOptions, lower_bundle
    from qwen_export.progress import console_progress

    options = None if target == "cpu" else LoweringOptions(compute_dtype)
    return lower_bundle(bundle, target, options, overwrite=overwrite, progress=console_progress)


def _refuse_given(names: tuple[str, ...], reason: str) -> None:
    """Refuse options that were given, by their names in the function."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) != ParameterSource.DEFAULT
        if parameter.name in names and given:
            raise click.UsageError(f"{parameter.opts[0]} has no use for {reason}; leave it out")
