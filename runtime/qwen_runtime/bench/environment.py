"""Where a benchmark ran, and who else did."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Self

from qwen_runtime.bandwidth import available_threads, cache_bytes

__all__ = ["Environment", "OtherWork", "peak_memory_bytes"]

_PROC = Path("/proc")
_BUSY = 0.1
"""Share of the machine taken by others above which figures are not to be trusted."""


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and the versions; None where the system does not tell."""

    cpu: str
    cpu_mhz: float | None
    """Clock of the fastest core when the benchmark began."""
    cores: int
    """CPUs this process may run on."""
    threads: int
    """Threads of one operator."""
    cache_bytes: int
    """Last-level caches of all CPUs; 0 where the system does not tell."""
    memory_bytes: int | None
    os: str
    python: str
    versions: dict[str, str]
    """Of the packages that matter, by name."""
    load_average: tuple[float, float, float] | None
    """Runnable processes over 1, 5 and 15 minutes, before the benchmark."""

    @classmethod
    def read(cls, threads: int | None) -> Self:
        """Look around.

        Args:
            threads: Threads asked for; None for one per core.
        """
        cores = available_threads()
        clocks = [float(value) for value in _cpuinfo("cpu MHz")]
        return cls(
            cpu=next(iter(_cpuinfo("model name")), "") or platform.processor() or "unknown",
            cpu_mhz=max(clocks, default=None),
            cores=cores,
            threads=threads or cores,
            cache_bytes=cache_bytes(),
            memory_bytes=_memory_bytes(),
            os=platform.platform(),
            python=platform.python_version(),
            versions=_versions("qwen-export", "onnxruntime", "numpy", "tokenizers"),
            load_average=os.getloadavg() if hasattr(os, "getloadavg") else None,
        )


class OtherWork:
    """CPU time that other processes take, from its construction on."""

    def __init__(self) -> None:
        self._since = _clock_readings()

    def cores(self) -> float | None:
        """CPUs that others kept busy on average, a virtual machine's stolen time included.

        None where the system does not tell.
        """
        if self._since is None or (now := _clock_readings()) is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._since, now, strict=True))
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def is_much(cores: float) -> bool:
        """Whether so many busy CPUs disturb a measurement on this machine."""
        return cores > _BUSY * (os.cpu_count() or 1)


def peak_memory_bytes() -> int | None:
    """Most memory this process ever held resident; None where the system does not tell."""
    try:
        lines = (_PROC / "self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return next((int(value) * 1024 for value in found), None)


def _clock_readings() -> tuple[float, float, float] | None:
    """Seconds: wall clock; CPU time of all processes; CPU time of this one."""
    try:
        first = (_PROC / "stat").read_text("utf-8").splitlines()[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal: proc(5). Guests count as user.
    ticks = [int(value) for value in first.split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]
    return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def _cpuinfo(name: str) -> list[str]:
    try:
        lines = (_PROC / "cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
