"""Engines that were built before, in the user's cache folder.

::

    ~/.cache/qwen-export/engines/<key>/           a folder as it lies in a bundle
                                /.making-<random>/ one that is being copied there

A plan differs from build to build, so the key is of what goes into it: the graphs as TensorRT is
given them, the weights, the profiles, the GPUs, the release. Nothing here is needed: where it
cannot be read or written, the engine is built.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen_runtime.backends.packed_cache import user_cache
from qwen_runtime.engine_file import EngineFolder
from qwen_runtime.errors import BundleError

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "EngineCache", "cache_key"]

MAX_ENTRIES = 4
"""Engines kept; the one that was not used for longest goes first."""
MAX_BYTES = 20_000_000_000
"""Size of all engines kept; a larger one is not kept at all."""
_MAKING = ".making-"
_ABANDONED_AFTER_S = 24 * 3600
_log = logging.getLogger(__name__)


def cache_key(parts: Mapping[str, object]) -> str:
    """A name for what is built from these parts; they are JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class EngineCache:
    """Entries below one folder."""

    root: Path

    @classmethod
    def of_user(cls) -> EngineCache | None:
        """The user's; None where it is switched off."""
        folder = user_cache()
        return None if folder is None else cls(folder / "engines")

    def fetch(self, key: str, folder: Path) -> bool:
        """Put an engine's files into an empty folder, if there is a sound one of this key."""
        entry = self.root / key
        if not entry.is_dir():
            return False
        try:
            engine = EngineFolder.read(entry)
            engine.check_hashes()
            for path in entry.iterdir():
                _link(path, folder / path.name)
            os.utime(entry)
        except (OSError, BundleError) as error:
            _log.debug("cannot use %s: %s", entry, error)
            for path in folder.iterdir():
                path.unlink()
            shutil.rmtree(entry, ignore_errors=True)
            return False
        return True

    def add(self, key: str, folder: Path) -> None:
        """Keep a finished engine, in place of the oldest ones."""
        size = _size(folder)
        if size > MAX_BYTES:
            return
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._trim(size)
            making = Path(tempfile.mkdtemp(prefix=_MAKING, dir=self.root))
            try:
                for path in folder.iterdir():
                    _link(path, making / path.name)
                making.rename(self.root / key)
            finally:
                shutil.rmtree(making, ignore_errors=True)
        except OSError as error:
            _log.debug("cannot keep %s in %s: %s", folder, self.root, error)

    def _trim(self, room: int) -> None:
        """Delete what was not used for longest, and what an interrupted process has left."""
        entries = []
        for path in self.root.iterdir():
            age = time.time() - path.stat().st_mtime
            if not path.name.startswith(_MAKING):
                entries.append((age, path))
            elif age > _ABANDONED_AFTER_S:
                shutil.rmtree(path, ignore_errors=True)
        kept, total = 0, room
        for _, path in sorted(entries):
            kept, total = kept + 1, total + _size(path)
            if kept >= MAX_ENTRIES or total > MAX_BYTES:
                shutil.rmtree(path, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is never changed, or a copy where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
