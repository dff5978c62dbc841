"""``qwen-export engine``. Heavy imports wait until the command runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from qwen_export.errors import ExportError
from qwen_runtime.cli.support import json_option, print_json, reports
from qwen_runtime.errors import QwenRuntimeError

if TYPE_CHECKING:
    from qwen_runtime.bundle import Bundle

__all__ = ["engine", "show_engine", "target_option"]

_POSITIVE = click.IntRange(min=1)
TARGET_HELP = (
    "tensorrt-rtx builds without a GPU; tensorrt, the enterprise one, builds for the GPU at hand, "
    "is experimental and was never executed. May be given more than once."
)

target_option = click.option(
    "--target",
    "targets",
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    multiple=True,
    help=f"Build a TensorRT engine into the bundle as well: {TARGET_HELP}",
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
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    multiple=True,
    required=True,
    help=f"What to build with: {TARGET_HELP}",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["bf16", "fp16"]),
    default="bf16",
    show_default=True,
    help="Type of activations and caches. fp16 is refused where the model's numbers exceed it.",
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
@click.option("--overwrite", is_flag=True, help="Replace an engine of the target.")
@json_option
@reports(ExportError, QwenRuntimeError, extra="export")
def engine(
    bundle: Path,
    targets: tuple[str, ...],
    compute_dtype: Literal["bf16", "fp16"],
    max_batch: int,
    max_sequence: int | None,
    capacity: int | None,
    sms: tuple[int, ...] | None,
    separate_engines: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Build a TensorRT engine into BUNDLE, at engines/TARGET.

    TensorRT's own parser and builder make it, and it is refused where it would give wrong
    numbers. Nothing is executed: an engine is proved on the GPU that loads it.

    \b
    Examples:
      qwen-export engine artifacts/tiny-qwen2-chat --target tensorrt-rtx
      qwen-export engine artifacts/qwen --target tensorrt-rtx --max-batch 32 --capacity 8192
    """
    from qwen_export.progress import console_progress
    from qwen_export.targets.engine import build_engine, check_target
    from qwen_export.targets.options import EngineOptions
    from qwen_runtime.bundle import Bundle

    options = EngineOptions(
        compute_dtype, max_batch, max_sequence, capacity, sms, separate_engines
    )
    opened = Bundle.open(bundle)
    wanted = tuple(dict.fromkeys(targets))
    for target in wanted:
        check_target(target, options)
    built = {}
    for target in wanted:
        started = time.monotonic()
        made = build_engine(
            opened, target, options, overwrite=overwrite, progress=console_progress
        )
        built[target] = asdict(made.description) | {"path": str(made.path)}
        if not as_json:
            show_engine(opened, target, f"; {time.monotonic() - started:.0f} s")
    if as_json:
        print_json({"bundle": str(bundle), "engines": built})


def show_engine(bundle: Bundle, target: str, more: str = "") -> None:
    """Print one line on an engine, and its builder's warnings to stderr."""
    from qwen_export.inspection import engine_line
    from qwen_runtime.engine_file import EngineFolder

    made = EngineFolder.open(bundle, target)
    click.echo(f"{made.path}: {engine_line(made)}{more}")
    for warning in made.description.warnings:
        click.echo(f"Warning: {warning}", err=True)
