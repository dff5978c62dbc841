"""Looking at this machine: what it has is read, what it can do is tried."""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from qwen_export.doctor.attempt import Attempt, attempt, python_command
from qwen_export.doctor.machine import (
    Cuda,
    Gpu,
    Machine,
    OnnxRuntime,
    TensorRT,
    Trial,
)
from qwen_export.doctor.system import (
    declared_packages,
    find_caches,
    module_distributions,
    read_cpu,
    read_memory,
)
from qwen_runtime.bandwidth import available_threads

__all__ = ["driver_release", "examine", "parse_nvidia_smi", "try_here"]

_TIMEOUT_S = {"build": 300.0}
_OTHER_TIMEOUT_S = 90.0
"""A cold disk and a busy machine make imports slow; a hang is what this ends."""
_TRIALS = ("build", "onnxruntime", "tensorrt-rtx", "tensorrt", "cuda", "grammar")
_SMI_FIELDS = "name,compute_cap,memory.total,driver_version"


def examine() -> Machine:
    """Look at this machine. Takes about ten seconds, most of it for importing PyTorch."""
    with ThreadPoolExecutor(min(len(_TRIALS), available_threads())) as pool:
        done = dict(zip(_TRIALS, pool.map(try_here, _TRIALS), strict=True))
    return Machine(
        version=metadata.version("qwen-export"),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cpu=read_cpu(),
        memory=read_memory(),
        packages=declared_packages(),
        onnxruntime=_onnxruntime(done["onnxruntime"]),
        tensorrt_rtx=_tensorrt(done["tensorrt-rtx"]),
        tensorrt=_tensorrt(done["tensorrt"]),
        cuda=_cuda(done["cuda"]),
        build=_trial(done["build"]),
        grammar=_trial(done["grammar"]),
        caches=find_caches(os.environ),
    )


def try_here(
    name: str, *arguments: str, timeout_s: float | None = None, cached: bool = True
) -> Attempt:
    """Try something on this machine, in a process of its own.

    Args:
        name: A name in `trials.TRIALS`.
        *arguments: What it takes.
        timeout_s: Longest time it may take; None for the usual one.
        cached: Whether it may write to the user's cache folder.
    """
    if timeout_s is None:
        timeout_s = _TIMEOUT_S.get(name, _OTHER_TIMEOUT_S)
    command = python_command("qwen_export.doctor.trials", name, *arguments)
    environment = {} if cached else {"QWEN_EXPORT_CACHE": "off"}
    return attempt(command, timeout_s=timeout_s, environment=environment)


def parse_nvidia_smi(text: str) -> tuple[tuple[Gpu, ...], str | None]:
    """GPUs and the driver's release from nvidia-smi's table.

    Args:
        text: CSV without header or units: name, compute capability, memory in MiB, driver.
    """
    gpus, driver = [], None
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        try:
            name, capability, memory, driver = row
            major, minor = map(int, capability.split("."))
            gpus.append(Gpu(name, 10 * major + minor, int(memory) << 20))
        except ValueError:
            continue  # "[N/A]", or a message instead of a table
    return tuple(gpus), driver


def driver_release(text: str) -> str | None:
    """Release of the driver from /proc/driver/nvidia/version, or None."""
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _trial(done: Attempt) -> Trial:
    return Trial(done.error is None, done.seconds, done.error)


def _onnxruntime(done: Attempt) -> OnnxRuntime:
    facts = done.facts
    return OnnxRuntime(
        module_distributions("onnxruntime"),
        facts.get("version"),
        tuple(facts.get("providers", ())),
        facts.get("runs_cpu", False),
        facts.get("runs_cuda", False),
        done.error,
    )


def _tensorrt(done: Attempt) -> TensorRT:
    facts = done.facts
    return TensorRT(
        facts.get("version"),
        tuple(facts.get("sms", ())),
        facts.get("builds", False),
        facts.get("runs", False),
        done.missing,
        done.error,
    )


def _cuda(done: Attempt) -> Cuda:
    facts = done.facts
    gpus = tuple(Gpu(**gpu) for gpu in facts.get("gpus", ()))
    try:
        version = Path("/proc/driver/nvidia/version").read_text("utf-8")
    except OSError:
        version = ""
    driver = driver_release(version)
    found = Cuda(
        source=facts.get("source") or (driver and "/proc"),
        driver=driver,
        cuda_version=facts.get("cuda_version"),
        gpus=gpus,
        bindings=facts.get("bindings", False),
        libraries=facts.get("libraries", {}),
        error=None if done.missing else done.error,
    )
    if gpus and found.driver:
        return found
    return _with_nvidia_smi(found, _nvidia_smi(os.environ))


def _with_nvidia_smi(found: Cuda, text: str) -> Cuda:
    """What the bindings could not tell, from nvidia-smi."""
    gpus, driver = parse_nvidia_smi(text)
    if driver is None:
        return found
    return replace(
        found,
        source=found.source if found.source == "cuda-bindings" else "nvidia-smi",
        driver=found.driver or driver,
        gpus=found.gpus or gpus,
    )


def _nvidia_smi(environment: Mapping[str, str]) -> str:
    """The table that nvidia-smi prints; empty where it is not installed or fails."""
    path = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if path is None:
        return ""
    command = [path, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_OTHER_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
