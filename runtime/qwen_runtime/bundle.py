"""A bundle on disk: opened, checked, never written to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwen_runtime.errors import BundleError
from qwen_runtime.manifest import MANIFEST_FILE, Manifest

__all__ = ["Bundle", "sha256_of"]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle.

    Attributes:
        path: The bundle's folder.
        manifest: Its validated manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, allow_failed: bool = False) -> Bundle:
        """Open a bundle and check version, presence and sizes of its files.

        Hashes are left to `check_hashes`: reading every weight would double the load time.

        Args:
            path: The bundle's folder.
            allow_failed: Open a bundle whose parity failed, to look into it.

        Raises:
            BundleError: If the folder is no bundle, a file is missing or has another size, a
                path leaves the bundle, the bundle is newer than this runtime, or its parity
                failed when it was built.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(f"{folder} must be a bundle's folder, but is none", path=folder)
        manifest = Manifest.read(folder)
        bundle = cls(folder, manifest)
        bundle._check_names()
        bundle._check_sizes()
        if manifest.parity.status == "failed" and not allow_failed:
            raise BundleError(
                f"{folder} does not answer like its checkpoint: parity failed when it was built "
                "(see parity.html in it); build it again",
                path=folder,
            )
        return bundle

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: If the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path}: {name} must be listed under files in {MANIFEST_FILE}",
                path=self.path / name,
            )
        return self.path / name

    def check_hashes(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Read every core file and compare its sha256.

        Args:
            progress: Called with the number of bytes read since the last call.

        Raises:
            BundleError: Naming the first file that differs.
        """
        for name, entry in self.manifest.files.items():
            found = sha256_of(self.path / name, progress)
            if found != entry.sha256:
                raise BundleError(
                    f"{self.path / name}: sha256 must be {entry.sha256}, got {found}; the file "
                    "was changed or damaged: copy the bundle again or rebuild it",
                    path=self.path / name,
                )

    def _check_names(self) -> None:
        manifest = self.manifest
        used = [manifest.weights.file, *(graph.file for graph in manifest.graphs.values())]
        if manifest.tokenizer is not None:
            used += ["tokenizer.json", *manifest.tokenizer.chat_templates.values()]
        for name in used:
            self.file(name)
        root = self.path.resolve()
        for name in manifest.files:
            if not (self.path / name).resolve().is_relative_to(root):
                raise BundleError(
                    f"{self.path}: {name} leaves the bundle; a bundle's files lie inside it",
                    path=self.path / name,
                )

    def _check_sizes(self) -> None:
        for name, entry in self.manifest.files.items():
            path = self.path / name
            if not path.is_file():
                raise BundleError(f"{path} is missing; copy the bundle again", path=path)
            size = path.stat().st_size
            if size != entry.num_bytes:
                raise BundleError(
                    f"{path}: size must be {entry.num_bytes} bytes, got {size}; copy the bundle "
                    "again",
                    path=path,
                )


def sha256_of(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
