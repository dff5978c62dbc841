"""``qwen-export verify``. Heavy imports wait until the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qwen_export.errors import ExportError
from qwen_runtime.cli.support import json_option, reports
from qwen_runtime.errors import QwenRuntimeError, RequestError

if TYPE_CHECKING:
    from qwen_export.parity import ParityReport
    from qwen_runtime.manifest import ParitySummary

__all__ = ["parity_line", "revision_option", "verify"]

revision_option = click.option(
    "--revision", metavar="REV", help="Branch, tag or commit of a hub id."
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("model", required=False)
@click.option(
    "--backend",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the bundle.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Where.  [default: cpu with onnxruntime, cuda with tensorrt]",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write parity.json and parity.html into this folder.",
)
@revision_option
@json_option
@reports(ExportError, QwenRuntimeError, extra="export")
def verify(
    bundle: Path,
    model: str | None,
    backend: str,
    device: str | None,
    report: Path | None,
    revision: str | None,
    as_json: bool,
) -> None:
    """Compare BUNDLE with MODEL in PyTorch again; nothing is written into the bundle.

    MODEL is the checkpoint the bundle was built from, by default the one its manifest names, if
    that is the embedded model or a hub id. With --device cuda the bundle runs on the GPU at hand,
    from the engine or the graphs it has for it, and is held to the tolerance of their compute dtype.

    \b
    Examples:
      qwen-export verify artifacts/qwen Qwen/Qwen2.5-0.5B-Instruct
      qwen-export verify artifacts/tiny-qwen2-chat --device cuda --report parity
    """
    from qwen_export.bundle import EMBEDDED_MODEL, embedded_model
    from qwen_export.checkpoint import open_checkpoint
    from qwen_export.parity import open_place
    from qwen_export.parity import verify as verify_parity
    from qwen_export.progress import console_progress
    from qwen_runtime.backends.registry import DEVICES, check_backend
    from qwen_runtime.bundle import Bundle

    device = device or DEVICES[backend][0]
    try:
        check_backend(backend, device)
    except RequestError as error:
        raise click.UsageError(str(error)) from error
    opened = Bundle.open(bundle, allow_failed=True)
    source = opened.manifest.source
    if model is None and source != EMBEDDED_MODEL and "/" not in source:
        raise click.UsageError(
            f"MODEL is needed: {bundle} was built from a local folder, {source}"
        )
    total = sum(entry.num_bytes for entry in opened.manifest.files.values())
    with console_progress("Hashing", total, unit="B") as advance:
        opened.check_hashes(advance)
    checkpoint = open_checkpoint(
        model or (embedded_model() if source == EMBEDDED_MODEL else source),
        revision=revision or (opened.manifest.revision if model is None else None),
    )
    place = open_place(opened, backend, device)
    found = verify_parity(opened, checkpoint, place=place, progress=console_progress)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        found.write_pages(report)
    if as_json:
        click.echo(found.to_json(), nl=False)
    else:
        verdict = f"{bundle}\n{_report_line(found)}"
        click.echo(verdict if found.passed else f"{verdict}\n{found.first_departure}")
    if not found.passed:
        raise click.exceptions.Exit(1)


def parity_line(parity: ParitySummary) -> str:
    """A bundle's parity in lines of at most 80 characters."""
    if parity.status == "not_verified":
        return "parity was not verified (--no-verify)"
    line = (
        f"parity {parity.status}: {parity.tokens_compared} tokens compared with PyTorch, "
        f"{parity.ties} ties\nmax logit error {parity.max_logit_error:.1e} "
        f"(tolerance {parity.tolerance:.0e})"
    )
    quality = parity.quality
    if quality is None:
        return line
    return (
        f"{line}\nquantised, as served: {quality.top1_agreement:.1%} of tokens as the original's, "
        f"mean KL {quality.mean_kl:.2g} nats"
    )


def _report_line(report: ParityReport) -> str:
    """A report in lines of at most 80 characters; of a device, with what it rounds."""
    from qwen_export.parity.report import CPU

    if report.device == CPU or report.quality is None:
        return parity_line(report.summary())
    quality = report.quality
    state = "passed" if report.passed else "failed"
    return (
        f"{report.backend} on {report.device}, {report.compute_dtype}\n"
        f"parity {state}: {report.tokens_compared} tokens compared with PyTorch, "
        f"{report.ties} ties\nmax logit error {report.max_error:.1e} "
        f"(tolerance {report.tolerance:.0e})\n"
        f"{quality.top1_agreement:.1%} of tokens as the original's, "
        f"mean KL {quality.mean_kl:.2g} nats"
    )
