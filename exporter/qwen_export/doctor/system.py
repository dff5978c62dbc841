"""Processor, memory, packages and cache folders, read from where the system keeps them."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from qwen_export.doctor.machine import CacheFolder, Cpu, Memory, Package
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE, user_cache
from qwen_runtime.bandwidth import available_threads

__all__ = [
    "available_memory",
    "cpu_features",
    "declared_packages",
    "find_caches",
    "module_distributions",
    "read_cpu",
    "read_memory",
]

_DISTRIBUTION = "qwen-export"
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "asimddp": "DOT",
    "i8mm": "I8MM",
    "sve": "SVE",
}
"""Flags of /proc/cpuinfo that ONNX Runtime has matrix kernels for, and their makers' names."""
_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[[^]]*\])?\s*(?P<wanted>[^;]*?)"
    r"""\s*(?:;.*?extra\s*==\s*["'](?P<extra>[\w-]+)["'].*)?"""
)


def read_cpu() -> Cpu:
    """The processor."""
    cpuinfo = _read(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return Cpu(
        (model[1] if model else platform.processor()) or platform.machine(),
        available_threads(),
        cpu_features(cpuinfo),
    )


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Instruction sets of a /proc/cpuinfo that matter."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return tuple(name for flag, name in _FEATURES.items() if flag in flags)


def read_memory() -> Memory:
    """Main memory."""
    meminfo = _read(Path("/proc/meminfo"))
    sizes = {
        name: int(kib) * 1024
        for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", meminfo, re.MULTILINE)
    }
    total = sizes.get("MemTotal")
    group = Path("/sys/fs/cgroup")
    available = available_memory(
        sizes.get("MemAvailable"),
        _read(group / "memory.max"),
        _read(group / "memory.current"),
        _read(group / "memory.stat"),
    )
    return Memory(total, available)


def available_memory(
    free_bytes: int | None, limit: str, current: str, statistics: str
) -> int | None:
    """What a process can have: the machine's, or less where a control group has a limit.

    Args:
        free_bytes: MemAvailable of the machine.
        limit: The group's memory.max: a number or "max"; empty where there is none.
        current: Its memory.current.
        statistics: Its memory.stat; the inactive file pages in it are given up when needed.
    """
    if not (limit.strip().isdigit() and current.strip().isdigit()):
        return free_bytes
    cached = re.search(r"^inactive_file (\d+)$", statistics, re.MULTILINE)
    left = max(0, int(limit) - int(current) + (int(cached[1]) if cached else 0))
    return left if free_bytes is None else min(left, free_bytes)


def declared_packages(
    requirements: Iterable[str] | None = None, *, without: str = "dev"
) -> tuple[Package, ...]:
    """Packages that qwen-export asks for, with the versions that are installed.

    Args:
        requirements: As distributions declare them; None for those of qwen-export.
        without: An extra to leave out.
    """
    if requirements is None:
        requirements = metadata.requires(_DISTRIBUTION) or ()
    found: dict[str, Package] = {}
    for requirement in requirements:
        match = _REQUIREMENT.fullmatch(requirement)
        if match is None or match["extra"] == without:
            continue
        name, extra = match["name"], match["extra"]
        before = found.get(name)
        extras = (*(before.extras if before else ()), *([extra] if extra else ()))
        found[name] = Package(name, installed_version(name), match["wanted"].strip(), extras)
    return tuple(found.values())


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def module_distributions(module: str) -> tuple[str, ...]:
    """Installed distributions that hold a module, with their versions."""
    names = sorted(set(metadata.packages_distributions().get(module, ())))
    return tuple(f"{name} {installed_version(name) or '?'}" for name in names)


def find_caches(environment: Mapping[str, str]) -> tuple[CacheFolder, ...]:
    """Cache folders of this user: ours, one entry for each of its parts, and the hub's."""
    found = []
    ours = user_cache()
    if ours is not None:
        parts = sorted(path for path in _folders(ours)) or [ours]
        holds = {"packed": "packed weights", "engines": "engines", "proofs": "proofs of engines"}
        found += [
            _folder(part, holds.get(part.name, "of qwen-export"), CACHE_VARIABLE) for part in parts
        ]
    hub = _hub_cache(environment)
    if hub.is_dir():
        found.append(_folder(hub, "checkpoints of the hub", "HF_HUB_CACHE"))
    return tuple(found)


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it fetched; asked of no import, which may be missing."""
    if chosen := environment.get("HF_HUB_CACHE"):
        return Path(chosen).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def _folder(path: Path, holds: str, variable: str) -> CacheFolder:
    existing = next((each for each in (path, *path.parents) if each.exists()), path)
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return CacheFolder(str(path), holds, _size(path), writable, variable)


def _folders(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.iterdir() if entry.is_dir()]
    except OSError:
        return []


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; links, of which the hub's cache is full, count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(root, name))
            except OSError:
                continue  # deleted meanwhile
            total += status.st_size
    return total


def _read(path: Path) -> str:
    """A file of the system; empty where there is none."""
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
