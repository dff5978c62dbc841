"""Whether a machine can run a bundle, its engines, and its graphs for CUDA.

On the CPU it is the bundle that says what runs: a graph of its own there, or the portable one.
"""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import dataclass, replace

from qwen_export.doctor.examination import try_here
from qwen_export.doctor.machine import Machine, Trial
from qwen_export.doctor.verdict import (
    Capability,
    run_cpu,
    run_cuda,
    run_rtx,
    run_tensorrt,
)
from qwen_runtime.backends.tensorrt.opening import choose_engine
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_file import EngineFolder, engine_names, refusal
from qwen_runtime.errors import BundleError
from qwen_runtime.lowered_file import LOWERED_FOLDER, LoweredFolder, lowered_names

__all__ = [
    "BundleFacts",
    "EngineFacts",
    "LoweredFacts",
    "bundle_capabilities",
    "needed_bytes",
    "read_bundle",
]

_CUDA = "cuda"
_CPU = "cpu"
_COPIES = {"fp32": 1, "int8": 2, "int4": 2}
"""Weights files in memory while ONNX Runtime loads: quantised weights are transposed, then packed."""
_BASE_BYTES = 300_000_000
"""Of a process that has loaded the runtime and a small model."""
_SLOWEST_BYTES_S = 20e6
"""A bundle on a slow network disk, to be told from one that hangs."""
_MIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """An engine of a bundle."""

    name: str
    folder: EngineFolder | None
    """None where it cannot be opened."""
    error: str | None = None
    """Why it cannot."""
    trial: Trial | None = None
    """It was loaded, proved and answered with a token; None where that was not tried."""


@dataclass(frozen=True, slots=True)
class LoweredFacts:
    """A bundle's graphs for ONNX Runtime's CUDA provider."""

    compute_dtype: str | None
    """None where they cannot be opened."""
    error: str | None = None
    """Why they cannot."""
    trial: Trial | None = None
    """They were loaded, proved and answered with a token; None where that was not tried."""


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """What decides whether a bundle runs somewhere."""

    path: str
    precision: str
    weight_bytes: int
    engines: tuple[EngineFacts, ...] = ()
    lowered: LoweredFacts | None = None
    """Its graphs for ONNX Runtime's CUDA provider; None where it has none."""
    trial: Trial | None = None
    """It was loaded and answered with a token; None where that was not tried."""
    graph: str | None = None
    """Its file that answered on the CPU; None where none did."""
    has_cpu_graph: bool = False
    """Whether it has a graph for the CPU beside the portable ones."""


def read_bundle(bundle: Bundle, machine: Machine) -> BundleFacts:
    """Read what decides, and let the bundle answer with a token where that can work.

    Args:
        bundle: Opened; nothing is written to it.
        machine: This machine.
    """
    manifest = bundle.manifest
    weight_bytes = manifest.files[manifest.weights.file].num_bytes
    lowered = lowered_names(bundle.path)
    facts = BundleFacts(
        str(bundle.path),
        manifest.precision,
        weight_bytes,
        tuple(_read_engine(bundle, name, machine) for name in engine_names(bundle.path)),
        _read_lowered(bundle, machine) if _CUDA in lowered else None,
        has_cpu_graph=_CPU in lowered,
    )
    if _run_cpu_reason(machine, facts) is not None:
        return facts
    trial, graph = _generate(bundle, "onnxruntime", "cpu")
    return replace(facts, trial=trial, graph=graph)


def needed_bytes(bundle: BundleFacts) -> int:
    """Memory that loading it takes, without caches."""
    return _BASE_BYTES + _COPIES.get(bundle.precision, 1) * bundle.weight_bytes


def bundle_capabilities(machine: Machine, bundle: BundleFacts) -> tuple[Capability, ...]:
    """Where a machine can run a bundle: on the CPU, each of its engines, and its CUDA graphs.

    Graphs that it does not have are named, with what makes them, where the machine could run them.
    """
    found = [
        _run_cpu(machine, bundle),
        *(_run_engine(machine, engine) for engine in bundle.engines),
    ]
    if bundle.lowered is not None or run_cuda(machine).can:
        found.append(_run_lowered(machine, bundle))
    return tuple(found)


def _generate(bundle: Bundle, backend: str, device: str) -> tuple[Trial, str | None]:
    """Load a bundle and ask for a token; also the file that answered, where the engine names it."""
    manifest = bundle.manifest
    weight_bytes = manifest.files[manifest.weights.file].num_bytes
    done = try_here(
        "generate",
        str(bundle.path.absolute()),
        backend,
        device,
        timeout_s=_MIN_TIMEOUT_S + weight_bytes / _SLOWEST_BYTES_S,
        cached=False,
    )
    return Trial(done.error is None, done.seconds, done.error), done.facts.get("graph")


def _read_engine(bundle: Bundle, name: str, machine: Machine) -> EngineFacts:
    try:
        facts = EngineFacts(name, EngineFolder.open(bundle, name))
        # The runtime takes one of a bundle's engines, so another one cannot be tried.
        if not _run_engine(machine, facts).can or choose_engine(bundle).path.name != name:
            return facts
    except BundleError as error:
        return EngineFacts(name, None, str(error))
    return replace(facts, trial=_generate(bundle, "tensorrt", "cuda")[0])


def _read_lowered(bundle: Bundle, machine: Machine) -> LoweredFacts:
    try:
        facts = LoweredFacts(LoweredFolder.open(bundle, _CUDA).description.compute_dtype)
    except BundleError as error:
        return LoweredFacts(None, str(error))
    if not run_cuda(machine).can:
        return facts
    return replace(facts, trial=_generate(bundle, "onnxruntime", "cuda")[0])


def _run_cpu_reason(machine: Machine, bundle: BundleFacts) -> tuple[str, str | None] | None:
    """What stands against trying it, and what to do."""
    runs = run_cpu(machine)
    if not runs.can:
        return runs.why, runs.fix
    needed, available = needed_bytes(bundle), machine.memory.available_bytes
    if available is not None and available < needed:
        why = (
            f"it needs {needed / 1e9:.1f} GB of memory and the caches, "
            f"{available / 1e9:.1f} GB are available"
        )
        fix = "free memory, or build it smaller: qwen-export build --precision int4"
        return why, None if bundle.precision == "int4" else fix
    return None


def _run_cpu(machine: Machine, bundle: BundleFacts) -> Capability:
    name = f"run it on the CPU ({bundle.precision})"
    if (refused := _run_cpu_reason(machine, bundle)) is not None:
        return Capability(name, False, *refused)
    trial = bundle.trial
    if trial is None or not trial.ok:
        why = "it was not tried" if trial is None else f"it fails: {trial.error}"
        return Capability(name, False, why)
    why = f"{bundle.graph or 'it'} answered with a token after {trial.seconds:.1f} s"
    fix = None
    if bundle.has_cpu_graph and not str(bundle.graph).startswith(LOWERED_FOLDER):
        why += f", because {tempfile.gettempdir()} has no room for what {LOWERED_FOLDER}/cpu loads"
        fix = f"set TMPDIR to a folder with {bundle.weight_bytes / 1e6:,.0f} MB"
    elif bundle.precision != "fp32" and not bundle.has_cpu_graph:
        why += "; a graph for the CPU is faster"
        fix = f"qwen-export engine {shlex.quote(bundle.path)} --target {_CPU}"
    return Capability(name, True, why, fix)


def _run_engine(machine: Machine, engine: EngineFacts) -> Capability:
    name = f"run its engine {engine.name}"
    if engine.folder is None:
        return Capability(name, False, engine.error or "it cannot be opened")
    found = engine.folder.description
    if found.flavour == "tensorrt":
        installed, runs = machine.tensorrt.version, run_tensorrt(machine)
    else:
        installed, runs = machine.tensorrt_rtx.version, run_rtx(machine)
    if not runs.can or installed is None:
        return Capability(name, False, runs.why, runs.fix)
    gpu = machine.cuda.gpus[0]  # the one that the runtime takes
    if (reason := refusal(engine.folder, installed, gpu.sm)) is not None:
        return Capability(name, False, reason)
    if engine.trial is None:
        why = f"built for {found.flavour} {found.version} and SM {gpu.sm}, as {gpu.name} has"
        return Capability(name, True, f"{why}; not tried")
    if not engine.trial.ok:
        return Capability(name, False, f"it fails: {engine.trial.error}")
    return Capability(
        name, True, f"on {gpu.name} it answered with a token after {engine.trial.seconds:.1f} s"
    )


def _run_lowered(machine: Machine, bundle: BundleFacts) -> Capability:
    name, found = "run its graphs for ONNX Runtime on CUDA", bundle.lowered
    if found is None:
        fix = f"qwen-export engine {shlex.quote(bundle.path)} --target {_CUDA}"
        return Capability(name, False, "it has none", fix)
    if found.compute_dtype is None:
        return Capability(name, False, found.error or "they cannot be opened")
    runs = run_cuda(machine)
    if not runs.can:
        return Capability(name, False, runs.why, runs.fix)
    if found.trial is None or not found.trial.ok:
        why = "they were not tried" if found.trial is None else f"they fail: {found.trial.error}"
        return Capability(name, False, why)
    gpu = machine.cuda.gpus[0].name
    return Capability(
        name,
        True,
        f"in {found.compute_dtype} on {gpu} they answered with a token after "
        f"{found.trial.seconds:.1f} s",
    )
