"""A report for people, as text; the command line's own modules are all it needs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

import click

from qwen_export.doctor.machine import CacheFolder, Machine, OnnxRuntime, TensorRT
from qwen_export.doctor.verdict import Capability, Fault

__all__ = ["report_text"]

_LABEL = 14


def report_text(
    machine: Machine,
    capabilities: Sequence[Capability],
    faults: Sequence[Fault],
    *,
    bundle: tuple[str, Sequence[Capability]] | None = None,
    width: int = 80,
) -> str:
    """The report.

    Args:
        machine: What was found.
        capabilities: What follows from it.
        faults: What is wrong with it.
        bundle: A bundle's path, and what the machine can do with it.
        width: Columns of the terminal.
    """
    lines = [*_heading("Machine"), *_hardware(machine, width)]
    lines += [*_heading("Software"), *_software(machine, width)]
    if machine.caches:
        lines += [*_heading("Caches"), *_caches(machine.caches, width)]
    if faults:
        lines += _heading("Wrong here")
        for fault in faults:
            lines += _wrapped("  ! ", fault.what, width, color="red")
            lines += _wrapped("    fix: ", fault.fix, width)
    lines += [*_heading("This machine can"), *_verdicts(capabilities, width)]
    if bundle is not None:
        path, verdicts = bundle
        lines += [*_heading(f"With {path}"), *_verdicts(verdicts, width)]
    return "\n".join(lines[1:])


def _heading(text: str) -> list[str]:
    return ["", click.style(text, bold=True)]


def _hardware(machine: Machine, width: int) -> Iterator[str]:
    python = f"Python {machine.python}, qwen-export {machine.version}"
    yield from _row("system", f"{machine.os}; {python}", width)
    cpu = machine.cpu
    features = f"; {', '.join(cpu.features)}" if cpu.features else ""
    cores = f"{cpu.cores} core{'s' if cpu.cores != 1 else ''}"
    yield from _row("CPU", f"{cpu.model}, {cores}{features}", width)
    memory = machine.memory
    total, available = _gb(memory.total_bytes), _gb(memory.available_bytes)
    yield from _row("memory", f"{total}, {available} available", width)
    cuda = machine.cuda
    if not cuda.gpus:
        what = "none seen by the NVIDIA driver" if cuda.source else "none: no NVIDIA driver"
        yield from _row("GPU", what, width)
    for gpu in cuda.gpus:
        yield from _row("GPU", f"{gpu.name}, SM {gpu.sm}, {_gb(gpu.memory_bytes)}", width)
    if cuda.source is not None:
        serves = ""
        if cuda.cuda_version:
            serves = (
                f", for CUDA up to {cuda.cuda_version // 1000}.{cuda.cuda_version % 1000 // 10}"
            )
        yield from _row("driver", f"{cuda.driver or 'unknown release'}{serves}", width)


def _software(machine: Machine, width: int) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for each in machine.packages:
        group = f"[{each.extras[0]}]" if each.extras else "always"
        groups.setdefault(group, []).append(f"{each.name} {each.installed or '-'}")
    for group, packages in groups.items():
        yield from _row(group, ", ".join(packages), width)
    yield from _row("onnxruntime", _onnxruntime(machine.onnxruntime), width)
    flavours: tuple[tuple[str, TensorRT], ...] = (
        ("TensorRT-RTX", machine.tensorrt_rtx),
        ("TensorRT", machine.tensorrt),
    )
    for label, flavour in flavours:
        yield from _row(label, flavour.version or "not installed", width)
    yield from _row("CUDA", _libraries(machine.cuda.libraries), width)


def _onnxruntime(found: OnnxRuntime) -> str:
    if not found.distributions:
        return "not installed"
    packages = ", ".join(found.distributions)
    if found.version is None:
        return f"{packages}; cannot be imported"
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in found.providers)
    text = f"{packages}; providers: {providers}"
    if "CUDAExecutionProvider" not in found.providers:
        return text
    return f"{text}; CUDA {'works' if found.runs_cuda else f'fails: {found.error}'}"


def _libraries(libraries: Mapping[str, str | None]) -> str:
    if not libraries:
        return "libraries not looked for: cuda-bindings is not installed"
    found = [path for path in libraries.values() if path is not None]
    absent = [name for name, path in libraries.items() if path is None]
    text = ", ".join(found)
    if not absent:
        return text
    return f"{text}{'; ' if found else ''}not found: {', '.join(absent)}"


def _caches(caches: Sequence[CacheFolder], width: int) -> Iterator[str]:
    for cache in caches:
        yield from _row(f"{cache.num_bytes / 1e6:,.1f} MB", f"{cache.path}: {cache.holds}", width)


def _verdicts(capabilities: Sequence[Capability], width: int) -> Iterator[str]:
    for each in capabilities:
        color = "green" if each.can else "red" if each.required else "yellow"
        mark = click.style("yes" if each.can else "no ", fg=color)
        yield f"  {mark}  {each.name}"
        yield from _wrapped("       ", each.why, width)
        if each.fix is not None:
            yield from _wrapped("       fix: ", each.fix, width)


def _row(label: str, text: str, width: int) -> list[str]:
    return _wrapped(f"  {label:<{_LABEL}}  ", text, width)


def _wrapped(start: str, text: str, width: int, *, color: str | None = None) -> list[str]:
    """Text behind a label, its further lines below its first. Words, paths too, stay whole."""
    lines = textwrap.wrap(
        text,
        max(width - len(start), 20),
        break_long_words=False,
        break_on_hyphens=False,
    )
    first, *rest = lines or [""]
    indent = " " * len(start)
    return [click.style(start, fg=color) + first, *(indent + line for line in rest)]


def _gb(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1e9:.1f} GB"
