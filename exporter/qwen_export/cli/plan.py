"""``qwen-export plan``. Heavy imports wait until the command runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_export.errors import ExportError, OptionError
from qwen_runtime.cli.support import json_option, print_json, reports
from qwen_runtime.errors import QwenRuntimeError

if TYPE_CHECKING:
    from qwen_export.quantization.options import Method

__all__ = ["plan"]

_POSITIVE = click.IntRange(min=1)


@click.command()
@click.argument("model", required=False)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp32", "int8", "int4"]),
    multiple=True,
    help="Format of the weights; may be given more than once.  [default: all, that of a quantised "
    "checkpoint as build makes it by default]",
)
@click.option(
    "--compute-dtype",
    "compute_dtypes",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    multiple=True,
    help="Format of activations and KV caches: fp32 is the CPU's, the others an engine's on a "
    "GPU; may be given more than once.  [default: fp32 and bf16]",
)
@click.option(
    "--block-size",
    type=click.Choice(["32", "64", "128"]),
    help="As of build, for int8 and int4.",
)
@click.option(
    "--quantizer",
    type=click.Choice(["rtn", "search", "gptq"]),
    help="As of build, for int8 and int4; gptq needs more memory than the others.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text that guides --quantizer gptq; its length counts.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN[=int8]",
    help="As of build, for int8 and int4; may be given more than once.",
)
@click.option(
    "--max-context",
    type=_POSITIVE,
    metavar="N",
    help="Longest row of the bundle in tokens.  [default: max_position_embeddings]",
)
@click.option(
    "--context",
    "contexts",
    type=_POSITIVE,
    multiple=True,
    metavar="N",
    help="Tokens of a row to plan memory for; may be given more than once.  "
    "[default: 1024, 8192 and the longest]",
)
@click.option(
    "--batch",
    "batches",
    type=_POSITIVE,
    multiple=True,
    metavar="N",
    help="Rows at the same time; may be given more than once.  [default: 1]",
)
@click.option(
    "--threads",
    type=_POSITIVE,
    metavar="N",
    help="Threads that read memory while its bandwidth is measured.  [default: one per CPU]",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@json_option
@reports(ExportError, QwenRuntimeError, extra="export")
def plan(
    model: str | None,
    precisions: tuple[str, ...],
    compute_dtypes: tuple[str, ...],
    block_size: str | None,
    quantizer: Method | None,
    calibration: Path | None,
    keep: tuple[str, ...],
    max_context: int | None,
    contexts: tuple[int, ...],
    batches: tuple[int, ...],
    threads: int | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Show what MODEL is and what it will cost, before it is built.

    Parameters, settings and their traps, bytes on disk, memory to build and to run as LLM does,
    expected decode speed. MODEL is a folder or a hub id, by default the embedded model. Weights are
    neither fetched nor read, only the headers of their files. Exit status 1 where MODEL cannot be
    built, or not at a --precision that was asked for; what is known is shown nevertheless.

    \b
    Examples:
      qwen-export plan Qwen/Qwen2.5-7B-Instruct
      qwen-export plan ./checkpoint --precision int4 --batch 1 --batch 8 --context 4096
    """
    from qwen_export.bundle import embedded_model
    from qwen_export.planning import PlanOptions
    from qwen_export.planning import plan as plan_model
    from qwen_export.planning.tables import print_plan

    dtypes = compute_dtypes or ("fp32", "bf16")
    if threads is not None and "fp32" not in dtypes:
        raise click.UsageError("--threads is for the CPU, on which only --compute-dtype fp32 runs")
    try:
        options = PlanOptions(
            precisions=precisions or None,
            compute_dtypes=dtypes,
            max_context=max_context,
            contexts=contexts or None,
            batches=batches or (1,),
            block_size=None if block_size is None else int(block_size),
            quantizer=quantizer,
            calibration=calibration,
            keep=keep,
            threads=threads,
        )
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    made = plan_model(model or embedded_model(), options, revision=revision)
    if as_json:
        document = asdict(made)
        for entry, precision in zip(document["precisions"], made.precisions, strict=True):
            entry["disk"] = precision.disk and entry["disk"] | {"total": precision.disk.total}
            for use, memory in zip(entry["memory"], precision.memory, strict=True):
                use["total"] = memory.total
        print_json(document)
    else:
        print_plan(made)
    if made.refusal is not None or any(
        entry.refusal is not None and entry.precision in precisions for entry in made.precisions
    ):
        raise click.exceptions.Exit(1)
