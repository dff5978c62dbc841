"""Where a session's graph comes from: the bundle's own, or the one that is lowered for the CPU."""

from __future__ import annotations

import ctypes
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_runtime.backends.lowered_graph import EXACT_LEVEL, SERVED_LEVEL, write_graph
from qwen_runtime.backends.versions import require_version
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.errors import BackendError, BundleError
from qwen_runtime.lowered_file import LoweredFolder, lowered_names

__all__ = ["SessionGraph", "load", "return_freed_memory", "save"]

_CPU = "cpu"
_FUSED, _FUSED_DATA = "fused.onnx", "fused.bin"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionGraph:
    """One graph of a bundle, in the form that a session loads."""

    ort: Any
    bundle: Bundle
    file: str
    """The bundle's own."""
    lowered: LoweredFolder | None
    """What is run instead."""
    level: int
    """Accuracy level of MatMulNBits."""

    @classmethod
    def of(
        cls,
        ort: Any,
        bundle: Bundle,
        phase: Literal["prefill", "decode"],
        *,
        lowered: bool,
        exact: bool,
    ) -> SessionGraph:
        """The lowered graph of a phase if there is one and it is wanted, else the portable one.

        Args:
            ort: The module onnxruntime.
            bundle: An opened bundle.
            phase: "prefill" or "decode".
            lowered: Take the lowered graph where there is one; there is none for decode alone.
            exact: Do not round activations for quantised weights.

        Raises:
            BackendError: If ONNX Runtime is too old for the lowered graph.
            BundleError: If that is damaged, or was made for other weights.
        """
        folder = None
        if lowered and phase == "prefill" and _CPU in lowered_names(bundle.path):
            folder = LoweredFolder.open(bundle, _CPU)
            versions = folder.description.minimum_engine_versions
            require_version(ort.__version__, versions.get("onnxruntime"), _CPU)
        level = EXACT_LEVEL if exact else SERVED_LEVEL
        return cls(ort, bundle, bundle.manifest.graphs[phase].file, folder, level)

    @property
    def path(self) -> Path:
        """The .onnx file in the bundle."""
        if self.lowered is not None:
            return self.lowered.graph_file("prefill")
        return self.bundle.file(self.file)

    @property
    def sha256(self) -> str:
        """What the bundle says the file has."""
        if self.lowered is not None:
            return self.lowered.description.files[self.path.name].sha256
        return self.bundle.manifest.files[self.file].sha256

    def check_hashes(self) -> None:
        """Compare graph and weights with the sha256 that the bundle gives them.

        Raises:
            BundleError: Naming the first that differs.
        """
        names = [self.bundle.manifest.weights.file]
        if self.lowered is not None:
            self.lowered.check_hashes()
        else:
            names.insert(0, self.file)
        _check_hashes(self.bundle, *names)

    def fuse(self, options: Callable[[], Any], folder: Path) -> tuple[Path, Path]:
        """Save it in a folder with its weights in the arrangement of MatMulNBits, not packed.

        Returns:
            The graph's file, and that of its weights.
        """
        if self.lowered is not None:
            return self._write(folder)
        fused = folder / _FUSED
        fusing = options()
        fusing.add_session_config_entry("session.disable_prepacking", "1")
        save(self.ort, self.path, fusing, fused, folder / _FUSED_DATA)
        return fused, folder / _FUSED_DATA

    def open(self, options: Callable[[], Any], *, fall_back: bool) -> Any:
        """A session on it, its weights packed in memory.

        Args:
            options: Makes the session's.
            fall_back: Where there is no room for the weights of a lowered graph, open the portable
                one, and say so in the log.

        Raises:
            BackendError: If ONNX Runtime cannot load it, or there is no such room.
        """
        if self.lowered is not None:
            try:
                # What is not packed stays mapped, though the file has no name any longer.
                with tempfile.TemporaryDirectory(
                    prefix="qwen-export-", ignore_cleanup_errors=True
                ) as folder:
                    return load(self.ort, self._write(Path(folder))[0], options())
            except OSError as error:
                what = (
                    f"{self.path} needs a temporary folder with room for its weights: {error}; set "
                    "TMPDIR to one"
                )
                if not fall_back:
                    raise BackendError(what) from error
                _log.warning("%s; the portable graph, which is slower, is run instead", what)
        return load(self.ort, self.bundle.file(self.file), options())

    def _write(self, folder: Path) -> tuple[Path, Path]:
        """Write the lowered graph and its weights to a folder."""
        if self.lowered is None:
            raise AssertionError(f"{self.path} has its weights beside it")
        files = (folder / _FUSED, folder / _FUSED_DATA)
        weights = self.bundle.file(self.bundle.manifest.weights.file)
        write_graph(self.lowered, weights, *files, accuracy_level=self.level)
        return files


def _check_hashes(bundle: Bundle, *names: str) -> None:
    """Compare files with the sha256 that the manifest gives them.

    Raises:
        BundleError: Naming the first that differs.
    """
    for name in names:
        path, expected = bundle.file(name), bundle.manifest.files[name].sha256
        found = sha256_of(path)
        if found != expected:
            raise BundleError(
                f"{path}: sha256 must be {expected}, got {found}; the file was changed or damaged: "
                "copy the bundle again or rebuild it",
                path=path,
            )


def load(ort: Any, path: Path, options: Any) -> Any:
    """A session on a graph.

    Raises:
        BackendError: If ONNX Runtime cannot load it.
    """
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"ONNX Runtime could not load {path}: {error}") from error


def return_freed_memory() -> None:
    """Have the allocator give back what packing has freed: glibc keeps it for the process."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another C library, which is asked nothing


def save(ort: Any, path: Path, options: Any, target: Path, data: Path) -> Any:
    """Load a graph, saving it as it is after optimisation.

    Args:
        ort: The module onnxruntime.
        path: The graph.
        options: The session's, changed in place.
        target: The .onnx file to create.
        data: The file of its tensors to create, in the same folder.

    Returns:
        The session.

    Raises:
        BackendError: If ONNX Runtime cannot load it.
    """
    options.optimized_model_filepath = str(target)
    name = "session.optimized_model_external_initializers_file_name"
    options.add_session_config_entry(name, data.name)
    session = load(ort, path, options)
    return_freed_memory()
    return session
