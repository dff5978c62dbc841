"""How much memory this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_bytes"]

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that can be had without swapping: the machine's, or less where a container has less.

    Source:
        ``MemAvailable`` of proc(5); ``memory.max``, ``memory.current`` and ``memory.stat`` of
        control groups, version 2. Elsewhere than on Linux it is the machine's memory, free or not.
    """
    try:
        free = 1024 * int(_table(_MEMINFO)["MemAvailable:"])
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        own = _OWN_GROUP.read_text("ascii").split("0::/", 1)[1].splitlines()[0]
    except (OSError, IndexError, ValueError):
        return free
    # The limit may be that of a group around this one.
    group = _GROUPS / own
    groups = [group, *(parent for parent in group.parents if parent.is_relative_to(_GROUPS))]
    return max(0, min([free, *(room for at in groups if (room := _room(at)) is not None)]))


def _room(group: Path) -> int | None:
    """Bytes up to a control group's limit; None where it has none."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        # Pages of files that nobody has read for a while count as used, and go when others need
        # room: a container that has just downloaded a model is full of them.
        return limit - used + int(_table(group / "memory.stat")["inactive_file"])
    except (OSError, KeyError, ValueError):
        return None


def _table(file: Path) -> dict[str, str]:
    """First and second word of every line."""
    words = (line.split() for line in file.read_text("ascii").splitlines())
    return {line[0]: line[1] for line in words if len(line) > 1}
