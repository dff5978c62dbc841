"""Packed weights in the user's cache folder, so that they are mapped instead of made at each load.

::

    ~/.cache/qwen-export/packed/<key>/model.onnx     the optimised graph
                                      weights.bin    its tensors and their packed form
                                      entry.json     sizes of the two, written last
                               /.making-<random>/    an entry that is being made

An entry appears by renaming its folder, so that none is seen half made, whoever is interrupted. It
belongs to one bundle, one build of ONNX Runtime, one CPU model and one set of session options: all
are in its key. An entry takes 2.0 to 2.8 times its bundle's weights; the newest are kept, as many as
`MAX_ENTRIES` and `MAX_BYTES` allow. Nothing here is needed: deleting the folder costs packing once
more, and where it cannot be written weights are packed in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qwen_runtime.errors import RequestError

__all__ = [
    "CACHE_VARIABLE",
    "DATA_FILE",
    "MAX_BYTES",
    "MAX_ENTRIES",
    "MODEL_FILE",
    "PackedCache",
    "cpu_identity",
    "user_cache",
]

CACHE_VARIABLE = "QWEN_EXPORT_CACHE"
"""Environment variable: the folder to use instead of ~/.cache/qwen-export, or "off" for none."""
MAX_ENTRIES = 8
"""Entries kept; the one that was not used for longest goes first."""
MAX_BYTES = 40 << 30
"""Bytes kept, all entries together; the newest is kept however large it is. Two of a model of 8
billion weights in int8."""
MODEL_FILE, DATA_FILE, _ENTRY_FILE = "model.onnx", "weights.bin", "entry.json"
_MAKING = ".making-"
_ABANDONED_AFTER_S = 24 * 3600
_VERSION = 1
"""Part of every key; raised when what an entry holds changes."""
_log = logging.getLogger(__name__)


def user_cache() -> Path | None:
    """The folder for what can be made again: $QWEN_EXPORT_CACHE, $XDG_CACHE_HOME or ~/.cache.

    Returns:
        The folder, which need not exist; None where it is switched off or there is no home.

    Raises:
        RequestError: If the variable names the home folder of nobody.
    """
    chosen = os.environ.get(CACHE_VARIABLE, "")
    if chosen.lower() == "off":
        return None
    if chosen:
        try:
            return Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            raise RequestError(
                f"{CACHE_VARIABLE} must name a folder or be off, got {chosen}, whose home folder "
                "is not known; write the folder out",
                param=CACHE_VARIABLE,
            ) from error
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # which is how the specification says to read it
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return base / "qwen-export"


@cache
def cpu_identity() -> str:
    """Model and instruction sets of this CPU, on which the form of packed weights depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    known = [line for line in lines if line.partition("\t")[0].strip() in wanted]
    return "\n".join([platform.machine(), platform.processor(), *known])


@dataclass(frozen=True, slots=True)
class PackedCache:
    """Entries below one folder."""

    root: Path

    @classmethod
    def of_user(cls) -> PackedCache | None:
        """The user's; None where it is switched off."""
        folder = user_cache()
        return None if folder is None else cls(folder / "packed")

    def find(self, parts: Mapping[str, str]) -> Path | None:
        """The graph of a complete entry, marked as used just now; None if there is none.

        Args:
            parts: What the entry depends on, by name.
        """
        entry = self.root / _key(parts)
        try:
            sizes = json.loads((entry / _ENTRY_FILE).read_text("utf-8"))
            if any((entry / name).stat().st_size != sizes[name] for name in _FILES):
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        try:
            os.utime(entry)
        except OSError as error:
            _log.debug("cannot mark %s as used: %s", entry, error)
        return entry / MODEL_FILE

    @contextmanager
    def making(self, num_bytes: int) -> Iterator[Path]:
        """A new folder to make an entry in; gone afterwards, unless `add` has taken it.

        Args:
            num_bytes: Free space without which it is not begun.

        Raises:
            OSError: If there is no such place or too little space in it.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._trim(MAX_ENTRIES - 1)
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise OSError(f"{self.root} has {free} bytes free, and packing needs {num_bytes}")
        folder = Path(tempfile.mkdtemp(prefix=_MAKING, dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, parts: Mapping[str, str], folder: Path) -> Path:
        """Make a folder of `making` an entry, or take the one another process has made meanwhile.

        Args:
            parts: As for `find`.
            folder: Holds `MODEL_FILE` and `DATA_FILE`.

        Returns:
            The entry's graph.

        Raises:
            OSError: If the files cannot be written out.
        """
        sizes = {name: (folder / name).stat().st_size for name in _FILES}
        (folder / _ENTRY_FILE).write_text(json.dumps(sizes), "utf-8")
        for name in (*_FILES, _ENTRY_FILE):
            _write_out(folder / name)
        entry = self.root / _key(parts)
        if self.find(parts) is None:
            shutil.rmtree(entry, ignore_errors=True)  # damaged, or none
            try:
                folder.rename(entry)
            except OSError:
                if self.find(parts) is None:
                    raise
        self._trim(MAX_ENTRIES)
        return entry / MODEL_FILE

    def _trim(self, max_entries: int) -> None:
        """Delete what was not used for longest, and what an interrupted process has left."""
        entries = []
        for path in self.root.iterdir():
            try:
                age = time.time() - path.stat().st_mtime
            except OSError:
                continue  # another process deleted it
            if not path.name.startswith(_MAKING):
                entries.append((age, path))
            elif age > _ABANDONED_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)
        total = 0
        for index, (_, path) in enumerate(sorted(entries)):
            total += _num_bytes(path)
            if index >= max_entries or (index and total > MAX_BYTES):
                # Whoever has its files mapped keeps them.
                shutil.rmtree(path, ignore_errors=True)


_FILES = (MODEL_FILE, DATA_FILE)


def _key(parts: Mapping[str, str]) -> str:
    text = json.dumps({**parts, "version": _VERSION, "cpu": cpu_identity()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _num_bytes(entry: Path) -> int:
    try:
        return sum(file.stat().st_size for file in entry.iterdir())
    except OSError:
        return 0  # another process is deleting it


def _write_out(path: Path) -> None:
    """Have the disk hold the file before its folder gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
