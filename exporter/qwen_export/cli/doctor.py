"""``qwen-export doctor``. Its imports wait until the command runs."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import click

from qwen_runtime.cli.support import json_option, print_json, reports
from qwen_runtime.errors import QwenRuntimeError

__all__ = ["doctor"]


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@json_option
@reports(QwenRuntimeError)
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Show what this machine can build and run, and how to mend what it cannot.

    What it can is tried: a model of one layer is built and compared with PyTorch, a session and
    an engine are made, each in a process of its own. That takes about ten seconds. With BUNDLE,
    also whether this machine runs it and its engines; the bundle is loaded and answers with a
    token.

    Exit status 0 where bundles can be built and run on the CPU or, with BUNDLE, where the bundle
    can be run here, on the CPU or as one of its engines.

    \b
    Examples:
      qwen-export doctor
      qwen-export doctor artifacts/qwen --json
    """
    from qwen_export.doctor import (
        bundle_capabilities,
        capabilities,
        examine,
        faults,
        read_bundle,
        report_text,
    )
    from qwen_runtime.bundle import Bundle

    opened = None if bundle is None else Bundle.open(bundle)
    click.echo("Trying what this machine can do: some ten seconds", err=True)
    machine = examine()
    can, wrong = capabilities(machine), faults(machine)
    fits = None
    if opened is not None:
        fits = bundle_capabilities(machine, read_bundle(opened, machine))
    if as_json:
        document: dict[str, object] = {
            "capabilities": [asdict(each) for each in can],
            "faults": [asdict(each) for each in wrong],
            "machine": asdict(machine),
        }
        if fits is not None:
            about = {"path": str(bundle), "capabilities": [asdict(each) for each in fits]}
            document["bundle"] = about
        print_json(document)
    else:
        width = max(60, min(100, shutil.get_terminal_size().columns))
        about_bundle = None if fits is None else (str(bundle), fits)
        click.echo(report_text(machine, can, wrong, bundle=about_bundle, width=width))
    fit = all(each.can for each in can if each.required)
    if fits is not None:
        fit = any(each.can for each in fits)
    if not fit:
        raise click.exceptions.Exit(1)
