"""ONNX Runtime sessions on a bundle's graphs: their settings, and packed weights made once.

Loading a quantised graph fuses it, transposes its codes and packs them: seconds, and twice the
weights in memory. So the packed form is saved in the user's cache folder, and later sessions map
it. Float weights are packed in memory: saving them would double what the bundle takes on disk.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_runtime.backends.base import FloatArray
from qwen_runtime.backends.packed_cache import (
    CACHE_VARIABLE,
    DATA_FILE,
    MODEL_FILE,
    PackedCache,
)
from qwen_runtime.backends.packed_file import rewrite
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.errors import BackendError, BundleError, RequestError

__all__ = [
    "SessionSettings",
    "check_threads",
    "import_onnxruntime",
    "open_session",
    "require_version",
]

MIN_CACHED_BYTES = 64 << 20
"""Weights files below this are packed at every load, in less than half a second."""
_SPACE = 5
"""Free space wanted for an entry, in weights files: the packed graph takes 2.3 to 2.5 of them and is
copied once; the fused one, 1.3 to 1.6, is gone by then."""
_SERVED_LEVEL, _EXACT_LEVEL = "4", "0"
"""Accuracy levels of MatMulNBits: 4 multiplies int8 activations, 0 fp32 ones."""
_PROOF_TOKENS = 8
_QUANTIZED = ("int8", "int4")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How a graph is run."""

    threads: int | None = None
    """Threads for one operator; None for ONNX Runtime's choice, one per core."""
    packed: bool = True
    """Pack weights, instead of reading them as they are in the file."""
    exact: bool = False
    """Multiply quantised weights in fp32, not with activations rounded to int8."""
    cached: bool = True
    """Map quantised weights from the user's cache folder, packing them there where they are not;
    not with ``exact``, which is for proofs."""


def open_session(ort: Any, bundle: Bundle, phase: str, settings: SessionSettings) -> Any:
    """Open a session on one of a bundle's graphs.

    Args:
        ort: The module onnxruntime.
        bundle: An opened bundle.
        phase: "prefill" or "decode".
        settings: How to run it. Quantised weights are packed whatever they say, since kernels
            for them know no other form and are a hundred times slower without.

    Returns:
        An onnxruntime.InferenceSession.

    Raises:
        BackendError: If ONNX Runtime cannot load the graph.
        BundleError: If weights that are about to be packed and saved are damaged.
    """
    manifest = bundle.manifest
    file = manifest.graphs[phase].file
    path = bundle.file(file)
    quantized = manifest.precision in _QUANTIZED

    def options() -> Any:
        return _options(ort, settings, packed=settings.packed or quantized)

    cache = None
    weights = manifest.files[manifest.weights.file]
    worth = weights.num_bytes >= MIN_CACHED_BYTES and not settings.exact
    if quantized and settings.cached and worth:
        cache = PackedCache.of_user()
    if cache is not None:
        parts = {
            "graph": manifest.files[file].sha256,
            "weights": weights.sha256,
            "onnxruntime": f"{ort.__version__} {ort.get_build_info()}",
            "accuracy_level": _SERVED_LEVEL,
        }
        try:
            entry = cache.find(parts)
            if entry is None:
                with cache.making(_SPACE * weights.num_bytes) as folder:
                    # An entry outlives its bundle and is found by these hashes.
                    _check_hashes(bundle, file, manifest.weights.file)
                    _save_packed(ort, path, options, folder)
                    entry = cache.add(parts, folder)
            return _load(ort, entry, options())
        except (OSError, BackendError) as error:
            _log.warning(
                "packed weights cannot be kept, so %s is packed in memory at every load: %s; "
                "set %s to another folder, or to off",
                path,
                error,
                CACHE_VARIABLE,
            )
    session = _load(ort, path, options())
    _return_freed_memory()
    return session


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


def _save_packed(ort: Any, path: Path, options: Callable[[], Any], folder: Path) -> None:
    """Save a graph and its packed weights as MODEL_FILE and DATA_FILE of a folder.

    In two steps, so that memory holds the weights transposed or packed, and not both.

    Raises:
        BackendError: If ONNX Runtime fails, or what it saved answers differently.
        OSError: If a file cannot be written.
    """
    fused, saved, data = folder / "fused.onnx", folder / MODEL_FILE, folder / "saved.bin"
    fusing = options()
    fusing.add_session_config_entry("session.disable_prepacking", "1")
    _save(ort, path, fusing, fused, folder / "fused.bin")
    packing = options()
    packing.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    expected = _answers(_save(ort, fused, packing, saved, data))
    _return_freed_memory()
    for made in (fused, folder / "fused.bin"):  # before the copy: the disk need not hold all three
        made.unlink()
    rewrite(saved, data, folder / DATA_FILE)
    data.unlink()
    found = _answers(_load(ort, saved, options()))
    if not all(map(np.array_equal, expected, found)):
        raise BackendError(f"{saved} answers differently from the graph it was saved from")


def _save(ort: Any, path: Path, options: Any, target: Path, data: Path) -> Any:
    """Load a graph, saving it as it is after optimisation."""
    options.optimized_model_filepath = str(target)
    name = "session.optimized_model_external_initializers_file_name"
    options.add_session_config_entry(name, data.name)
    session = _load(ort, path, options)
    _return_freed_memory()
    return session


def _answers(session: Any) -> list[FloatArray]:
    """Logits of a token alone, which has kernels of its own, and of several."""
    entries = {entry.name: entry for entry in session.get_inputs()}
    answers = []
    for tokens in (1, _PROOF_TOKENS):
        feeds: dict[str, Any] = {
            "input_ids": np.arange(tokens, dtype=np.int64)[None],
            "past_lengths": np.zeros(1, np.int64),
            "logits_indices": np.arange(tokens, dtype=np.int64)[None],
        }
        for name, entry in entries.items():
            if name not in feeds:
                _, heads, _, head_dim = entry.shape
                feeds[name] = np.zeros((1, heads, tokens, head_dim), np.float32)
        answers.append(session.run(["logits"], {name: feeds[name] for name in entries})[0])
    return answers


def _options(ort: Any, settings: SessionSettings, *, packed: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = _EXACT_LEVEL if settings.exact else _SERVED_LEVEL
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    return options


def _load(ort: Any, path: Path, options: Any) -> Any:
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"ONNX Runtime could not load {path}: {error}") from error


def _return_freed_memory() -> None:
    """Have the allocator give back what packing has freed: glibc keeps it for the process."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another C library, which is asked nothing


def check_threads(threads: object) -> None:
    """Refuse what is no number of threads.

    Raises:
        RequestError: If it is neither None nor an integer of at least 1.
    """
    is_count = isinstance(threads, int) and not isinstance(threads, bool) and threads >= 1
    if threads is not None and not is_count:
        raise RequestError(
            f"threads must be an integer >= 1, or None for one per core, got {threads!r}",
            param="threads",
        )


def import_onnxruntime(minimum: str | None) -> Any:
    """The module, if it is there and new enough.

    Args:
        minimum: The oldest version that a bundle runs on; None for any.

    Raises:
        BackendError: If it is missing or older.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise BackendError(
            "onnxruntime must be installed to run a bundle on the CPU: "
            "pip install 'qwen-export[cpu]'"
        ) from error
    require_version(ort.__version__, minimum, "cpu")
    return ort


def require_version(found: str, minimum: str | None, extra: str) -> None:
    """Refuse an onnxruntime that is too old.

    Args:
        found: Its version.
        minimum: The oldest that a bundle runs on; None for any.
        extra: The extra that brings a newer one.

    Raises:
        BackendError: If it is older.
    """
    if minimum is not None and _version(found) < _version(minimum):
        raise BackendError(
            f"onnxruntime must be at least {minimum} for this bundle, got {found}: "
            f"pip install -U 'qwen-export[{extra}]'"
        )


def _version(text: str) -> tuple[int, ...]:
    parts = (part for part in text.split("+")[0].split("."))
    return tuple(int(part) for part in parts if part.isdigit())
