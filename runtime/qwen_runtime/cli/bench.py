"""``qwen-run bench``: how fast a bundle answers on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from qwen_runtime.cli.support import json_option, print_json, reports
from qwen_runtime.errors import QwenRuntimeError, RequestError

__all__ = ["bench"]


def _distinct(
    context: click.Context, option: click.Parameter, values: tuple[int, ...]
) -> tuple[int, ...]:
    """Refuse a value given twice."""
    if len(set(values)) < len(values):
        raise click.BadParameter(f"must differ from each other, got {list(values)}")
    return values


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    multiple=True,
    callback=_distinct,
    help="Length of the prompts; repeatable.  [default: 32, 128, 512, 1024 as they fit]",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=2),
    default=32,
    show_default=True,
    help="Tokens that every run generates.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Rows of a run."
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Runs of each length that count; one before them does not.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; one per core by default."
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seeds the random prompts.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Draw time per token and prefill speed by length into FILE.html.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE.html if it exists.")
@json_option
@reports(QwenRuntimeError)
def bench(bundle: Path, plot: Path | None, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Measure how fast BUNDLE answers on this machine.

    Time to first token, time between tokens, tokens per second, bytes that a token streams from
    memory and their share of the measured read bandwidth, as a reader of the stream sees them.

    \b
    Examples:
      qwen-run bench artifacts/tiny-qwen2-chat
      qwen-run bench BUNDLE --prompt-tokens 128 --prompt-tokens 900 --plot speed.html
    """
    if overwrite and plot is None:
        raise click.UsageError("--overwrite belongs to --plot: name the file to draw")
    if plot is not None:
        _check_plot(plot, overwrite=overwrite)
    from qwen_runtime.bench import BenchOptions, render, table
    from qwen_runtime.bench import bench as run_bench
    from qwen_runtime.bundle import Bundle
    from qwen_runtime.cli.bars import Bars

    with Bars() as bars:
        result = run_bench(Bundle.open(bundle), BenchOptions(**options), progress=bars)
    for warning in result.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if plot is not None:
        _write_whole(plot, render(result))
        click.echo(f"Drawn: {plot}", err=True)
    if as_json:
        print_json(result.document())
    else:
        click.echo(table(result))


def _check_plot(path: Path, *, overwrite: bool) -> None:
    """Find out before minutes of measuring whether the drawing can be written."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"must end in .html, got {path.name}", param_hint="'--plot'")
    if path.is_dir():
        raise RequestError(f"--plot must name a file, but {path} is a folder", param="plot")
    if path.exists() and not overwrite:
        raise RequestError(
            f"--plot must name a new file, but {path} exists; pass --overwrite to replace it",
            param="plot",
        )
    if not path.parent.is_dir():
        raise RequestError(
            f"--plot must lie in a folder, but {path.parent} is none; make it first", param="plot"
        )
    import tempfile  # --help need not pay for it

    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is seen complete or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RequestError:
    return RequestError(
        f"--plot must be writable, but {path} is not: {error.strerror or error}; name another",
        param="plot",
    )
