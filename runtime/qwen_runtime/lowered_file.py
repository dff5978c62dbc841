"""Lowered graphs in a bundle's folder: opened, checked, and whether they are this bundle's.

Needs no engine. lowered.json, the document beside them, is `qwen_runtime.lowered_description`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.errors import BundleError
from qwen_runtime.lowered_description import LOWERED_FILE, GraphName, LoweredDescription

__all__ = ["LOWERED_FOLDER", "LoweredFolder", "lowered_names"]

LOWERED_FOLDER = "lowered"


@dataclass(frozen=True, slots=True)
class LoweredFolder:
    """Lowered graphs of a bundle, opened.

    Attributes:
        path: ``BUNDLE/lowered/<target>``.
        description: Its lowered.json.
    """

    path: Path
    description: LoweredDescription

    @classmethod
    def open(cls, bundle: Bundle, target: str) -> LoweredFolder:
        """Open a bundle's graphs for a target; check presence and sizes, and whose they are.

        Hashes are left to `check_hashes`.

        Args:
            bundle: The bundle they lie in.
            target: Their folder's name: "cuda".

        Raises:
            BundleError: If there are none, they are damaged, or they were made for other weights
                than this bundle's.
        """
        if target not in lowered_names(bundle.path):
            raise BundleError(
                f"{bundle.path} has no graphs for {target}; make them with `qwen-export engine "
                f"{shlex.quote(str(bundle.path))} --target {target}`",
                path=bundle.path / LOWERED_FOLDER / target,
            )
        lowered = cls.read(bundle.path / LOWERED_FOLDER / target)
        lowered._check_weights(bundle)
        return lowered

    @classmethod
    def read(cls, path: Path) -> LoweredFolder:
        """Read a folder of lowered graphs, wherever it lies; check presence and sizes.

        Raises:
            BundleError: If a file is missing, damaged, or has another size.
        """
        lowered = cls(path, LoweredDescription.read(path))
        lowered._check_sizes()
        return lowered

    @property
    def remake_command(self) -> str:
        """The command that makes these graphs again, in their place."""
        bundle = str(self.path.parent.parent)
        options = self.description.options
        return shlex.join(["qwen-export", "engine", bundle, *options, "--overwrite"])

    def graph_file(self, name: GraphName) -> Path:
        """Path of one of the graphs."""
        return self.path / self.description.graphs[name].file

    def check_hashes(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Read every graph and compare its sha256.

        Args:
            progress: Called with the number of bytes read since the last call.

        Raises:
            BundleError: Naming the first file that differs.
        """
        for name, entry in self.description.files.items():
            found = sha256_of(self.path / name, progress)
            if found != entry.sha256:
                raise self._damaged(name, f"sha256 must be {entry.sha256}, got {found}")

    def _check_sizes(self) -> None:
        for graph in self.description.graphs.values():
            if graph.file not in self.description.files:
                raise self._damaged(LOWERED_FILE, f"{graph.file} must be listed under files")
        for name, entry in self.description.files.items():
            path = self.path / name
            if not path.is_file():
                raise self._damaged(name, "the file is missing")
            size = path.stat().st_size
            if size != entry.num_bytes:
                raise self._damaged(name, f"size must be {entry.num_bytes} bytes, got {size}")

    def _check_weights(self, bundle: Bundle) -> None:
        weights = bundle.manifest.files[bundle.manifest.weights.file]
        if weights.sha256 != self.description.weights_sha256:
            raise BundleError(
                f"{self.path}: the graphs must be made for this bundle's "
                f"{bundle.manifest.weights.file}, but were made for another; make them again: "
                f"{self.remake_command}",
                path=self.path,
            )
        for entry in self.description.initializers:
            for part in entry.parts:
                if part.offset + part.num_bytes > weights.num_bytes:
                    raise self._damaged(
                        LOWERED_FILE,
                        f"{part.name} must lie in the {weights.num_bytes} bytes of "
                        f"{bundle.manifest.weights.file}, but ends at byte "
                        f"{part.offset + part.num_bytes}",
                    )

    def _damaged(self, name: str, what: str) -> BundleError:
        return BundleError(
            f"{self.path / name}: {what}; the graphs are damaged: copy them again, or make them "
            f"again: {self.remake_command}",
            path=self.path / name,
        )


def lowered_names(bundle: Path) -> tuple[str, ...]:
    """Targets that a bundle has graphs for, sorted; unfinished ones are hidden and left out."""
    folder = bundle / LOWERED_FOLDER
    if not folder.is_dir():
        return ()
    names = (entry.name for entry in folder.iterdir() if (entry / LOWERED_FILE).is_file())
    return tuple(sorted(name for name in names if not name.startswith(".")))
