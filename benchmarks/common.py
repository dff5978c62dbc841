"""What every benchmark shares: environment, memory readings, pairs and their medians."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

__all__ = ["environment", "median_ratio", "memory", "pairs", "report", "warn_if_busy"]


def environment() -> dict[str, object]:
    """Machine and versions."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    packages = ("onnxruntime", "torch", "transformers", "numpy")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
    }


def warn_if_busy() -> None:
    """Say on standard error that something else competes for the cores."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load average {load:.1f}", file=sys.stderr)


def memory() -> dict[str, float]:
    """This process's peak, resident, anonymous and file-backed memory, in MB."""
    wanted = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file"}
    values = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in wanted:
            values[wanted[name]] = int(value.split()[0]) / 1000
    return values


def pairs(
    ours: Callable[[], float], theirs: Callable[[], float], runs: int
) -> list[tuple[float, float]]:
    """Measure two things in turn, A B B A ..., so that drift of the machine cancels."""
    measured = []
    for run in range(runs):
        if run % 2:
            second, first = theirs(), ours()
        else:
            first, second = ours(), theirs()
        measured.append((first, second))
    return measured


def median_ratio(measured: list[tuple[float, float]]) -> float:
    """Median over the pairs of theirs / ours: how many times faster ours is."""
    return statistics.median(theirs / ours for ours, theirs in measured)


def report(result: dict[str, object], as_json: bool) -> None:
    """Print a result: a line per figure, or JSON."""
    result = {"command": " ".join(["python", *sys.argv]), **result, **environment()}
    if as_json:
        print(json.dumps(result, indent=2))
        return
    width = max(map(len, result))
    for name, value in result.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:<{width}}  {text}")
