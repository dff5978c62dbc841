"""The group of ``qwen-export``'s commands. Heavy imports wait until a command runs."""

from __future__ import annotations

import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_export.cli.doctor import doctor
from qwen_export.cli.engine import engine, show_target, target_option
from qwen_export.cli.plan import plan
from qwen_export.cli.verify import parity_line, revision_option, verify
from qwen_export.errors import ExportError, OptionError
from qwen_runtime.cli.support import CONTEXT, json_option, print_json, reports
from qwen_runtime.errors import QwenRuntimeError

if TYPE_CHECKING:
    from qwen_export.quantization.options import Method

__all__ = ["main"]


@click.group(context_settings=CONTEXT)
@click.version_option(metadata.version("qwen-export"), prog_name="qwen-export")
@click.option("--traceback", is_flag=True, help="Show the whole traceback of an error.")
def main(traceback: bool) -> None:
    """Turn Qwen2, Qwen2.5 and Qwen3 checkpoints into ONNX bundles proved equal to PyTorch.

    \b
    Examples:
      qwen-export build Qwen/Qwen2.5-0.5B-Instruct -o artifacts/qwen
      qwen-export inspect artifacts/qwen
    """


@main.command()
@click.argument("model", required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the bundle.  [default: artifacts/<model name>]",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle at the output.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8", "int4"]),
    help="Format of the weights.  [default: the checkpoint's own if it is quantised exactly, else "
    "fp32]",
)
@click.option(
    "--compute-dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Format of activations and KV caches in what --target builds for a GPU; what a CPU runs "
    "computes in fp32.  [default: bf16]",
)
@click.option(
    "--block-size",
    type=click.Choice(["32", "64", "128"]),
    help="Inputs of a quantised weight that share a scale.  [default: int8 128, int4 128, or the "
    "largest below that divides the weight's inputs]",
)
@click.option(
    "--quantizer",
    type=click.Choice(["rtn", "search", "gptq"]),
    help="What chooses codes and scales; named, it also rounds what the checkpoint stores "
    "quantised again.  [default: search]",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN[=int8]",
    help="Names of weights to store in fp32, as in '*.layers.0.*', or in int8, as in "
    "lm_head.weight=int8; may be given more than once.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Text that guides --quantizer gptq.",
)
@click.option(
    "--max-context",
    type=click.IntRange(min=1),
    metavar="N",
    help="Longest row in tokens.  [default: max_position_embeddings]",
)
@target_option
@revision_option
@click.option("--no-verify", is_flag=True, help="Do not prove parity with PyTorch.")
@json_option
@reports(ExportError, QwenRuntimeError, extra="export")
def build(
    model: str | None,
    output: Path | None,
    overwrite: bool,
    precision: str | None,
    compute_dtype: str | None,
    block_size: str | None,
    quantizer: Method | None,
    keep: tuple[str, ...],
    calibration: Path | None,
    max_context: int | None,
    targets: tuple[str, ...],
    revision: str | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Build a bundle from MODEL: a folder or a hub id; without it, a small embedded chat model.

    The bundle appears at the output only when it is complete and, unless --no-verify is given,
    has answered like the checkpoint does in PyTorch. One that fails is left at DIR.failed.

    \b
    Examples:
      qwen-export build --output artifacts/tiny
      qwen-export build Qwen/Qwen2.5-0.5B-Instruct --max-context 8192
      qwen-export build Qwen/Qwen2.5-7B --precision int4 --keep lm_head.weight=int8
    """
    from qwen_export.bundle import EMBEDDED_MODEL, BuildOptions
    from qwen_export.bundle import build as build_bundle
    from qwen_export.progress import console_progress

    if output is None:
        name = Path(model).resolve().name if model and Path(model).exists() else model
        output = Path("artifacts") / Path(name or EMBEDDED_MODEL).name
    started = time.monotonic()
    try:
        options = BuildOptions(
            precision,
            compute_dtype,
            max_context,
            verify=not no_verify,
            block_size=None if block_size is None else int(block_size),
            quantizer=quantizer,
            keep=keep,
            calibration=calibration,
            targets=targets,
        )
        bundle = build_bundle(
            model,
            output,
            options,
            revision=revision,
            overwrite=overwrite,
            progress=console_progress,
        )
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    seconds = time.monotonic() - started
    if as_json:
        from qwen_export.inspection import summary

        print_json(summary(bundle) | {"seconds": round(seconds, 2)})
        return
    size = sum(entry.num_bytes for entry in bundle.manifest.files.values())
    click.echo(
        f"{output}: {size / 1e6:.1f} MB in {seconds:.0f} s\n{parity_line(bundle.manifest.parity)}"
    )
    for target in dict.fromkeys(targets):
        show_target(bundle, target)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
@reports(ExportError, QwenRuntimeError, extra="export")
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what BUNDLE holds: model, graphs, files, versions, parity.

    \b
    Example:
      qwen-export inspect artifacts/tiny-qwen2-chat
    """
    from qwen_export.inspection import describe_text, summary
    from qwen_runtime.bundle import Bundle

    opened = Bundle.open(bundle, allow_failed=True)
    if as_json:
        print_json(summary(opened))
    else:
        click.echo(describe_text(opened))


@main.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the bundle.  [default: artifacts/tiny-qwen2-chat]",
)
@reports(ExportError, QwenRuntimeError, extra="export")
def demo(output: Path | None) -> None:
    """Build the embedded model, verify it against PyTorch, and let it answer a question.

    The default folder is replaced; another one must not exist.

    \b
    Example:
      qwen-export demo
    """
    from qwen_export.bundle import EMBEDDED_MODEL
    from qwen_export.bundle import build as build_bundle
    from qwen_export.progress import console_progress
    from qwen_runtime.llm import LLM

    folder = output or Path("artifacts") / EMBEDDED_MODEL
    bundle = build_bundle(None, folder, overwrite=output is None, progress=console_progress)
    question = "What is 17 + 25?"
    with LLM(bundle) as llm:
        messages = [{"role": "user", "content": question}]
        answer = llm.generate(messages, do_sample=False, max_new_tokens=64)
    click.echo(f"Bundle:   {folder}")
    click.echo(f"Question: {question}")
    click.echo(f"Answer:   {answer.text}")
    click.echo(parity_line(bundle.manifest.parity))


main.add_command(engine)
main.add_command(doctor)
main.add_command(plan)
main.add_command(verify)
