"""Doing something in a process of its own: what is tried here may crash, hang, or be slow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Attempt", "attempt", "python_command"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """How far a process came."""

    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What it found out before it ended."""
    error: str | None = None
    """Why it ended early; None where it came to its end."""
    missing: str | None = None
    """The module whose absence ended it."""


def attempt(
    command: Sequence[str], *, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Attempt:
    """Run a command that reports on its stdout, whatever becomes of it.

    Args:
        command: Prints a JSON object for each step it has done; their entries are the facts. An
            object with "error", and "missing" for a module, says why it stops.
        timeout_s: Longest time it may take.
        environment: Environment variables to add.

    Returns:
        The facts, also those that came before a crash.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    error: str | None = None
    with process:
        try:
            output, said = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, said = process.communicate()
            error = f"did not end within {timeout_s:.0f} s"
        except BaseException:
            process.kill()
            raise
    facts = _facts(output)
    reported = facts.pop("error", None)
    missing = facts.pop("missing", None)
    if error is None and reported is not None:
        error = str(reported)
    elif error is None and process.returncode:
        error = _ending(process.returncode, said)
    return Attempt(time.monotonic() - started, facts, error, missing)


def python_command(module: str, *arguments: str) -> list[str]:
    """A command that runs a module in this Python; the working folder does not shadow packages."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _facts(output: str) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # a line cut off by a crash
        if isinstance(found, dict):
            facts |= found
    return facts


def _ending(status: int, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = f": {lines[-1]}" if lines else ""
    if status >= 0:
        return f"ended with exit status {status}{last}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"crashed ({name}){last}"
