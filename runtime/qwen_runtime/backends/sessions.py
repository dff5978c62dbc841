"""ONNX Runtime sessions on a bundle's graphs: their settings, and packed weights made once.

Loading a quantised graph fuses it, transposes its codes and packs them: seconds, and twice the
weights in memory. So the packed form is saved in the user's cache folder, and later sessions map
it. Float weights are packed in memory: saving them would double what the bundle takes on disk.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_runtime.backends.base import FloatArray
from qwen_runtime.backends.lowered_graph import EXACT_LEVEL, SERVED_LEVEL
from qwen_runtime.backends.packed_cache import (
    CACHE_VARIABLE,
    DATA_FILE,
    MODEL_FILE,
    PackedCache,
)
from qwen_runtime.backends.packed_file import rewrite
from qwen_runtime.backends.session_graphs import SessionGraph, load, return_freed_memory, save
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError, RequestError

__all__ = [
    "TOTAL_LENGTH",
    "SessionSettings",
    "check_threads",
    "open_session",
]

MIN_CACHED_BYTES = 64 << 20
"""Weights files below this are packed at every load, in less than half a second."""
_SPACE = 5
"""Free space wanted for an entry, in weights files: the packed graph takes 2.0 to 2.8 of them and is
copied once; the fused one, 1.0 to 1.6, is gone by then."""
_PROOF_TOKENS = 8
TOTAL_LENGTH = "total_sequence_length"
"""The input that only lowered graphs have, [1] int32: past and new tokens of the longest row."""
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
    lowered: bool = True
    """Take the graph of the bundle's ``lowered/cpu`` for prompts where there is one."""
    cached: bool = True
    """Map quantised weights from the user's cache folder, packing them there where they are not;
    not with ``exact``, which is for proofs."""


def open_session(
    ort: Any, bundle: Bundle, phase: Literal["prefill", "decode"], settings: SessionSettings
) -> Any:
    """Open a session on one of a bundle's graphs.

    Args:
        ort: The module onnxruntime.
        bundle: An opened bundle.
        phase: "prefill" or "decode".
        settings: How to run it. Quantised weights are packed whatever they say, since kernels
            for them know no other form and are a hundred times slower without.

    Returns:
        An onnxruntime.InferenceSession. One on a lowered graph has the input
        ``total_sequence_length``.

    Raises:
        BackendError: If ONNX Runtime cannot load the graph.
        BundleError: If a lowered graph is damaged or belongs to other weights, or weights that are
            about to be packed and saved are damaged.
    """
    manifest = bundle.manifest
    quantized = manifest.precision in _QUANTIZED
    graph = SessionGraph.of(ort, bundle, phase, lowered=settings.lowered, exact=settings.exact)

    def options() -> Any:
        return _options(ort, settings, packed=settings.packed or quantized)

    cache = None
    weights = manifest.files[manifest.weights.file]
    worth = weights.num_bytes >= MIN_CACHED_BYTES and not settings.exact
    if quantized and settings.cached and worth:
        cache = PackedCache.of_user()
    if cache is not None:
        parts = {
            "graph": graph.sha256,
            "weights": weights.sha256,
            "onnxruntime": f"{ort.__version__} {ort.get_build_info()}",
            "accuracy_level": str(SERVED_LEVEL),
        }
        try:
            entry = cache.find(parts)
            if entry is None:
                with cache.making(_SPACE * weights.num_bytes) as folder:
                    # An entry outlives its bundle and is found by these hashes.
                    graph.check_hashes()
                    _save_packed(ort, graph, options, folder)
                    entry = cache.add(parts, folder)
                return_freed_memory()
            return load(ort, entry, options())
        except (OSError, BackendError) as error:
            _log.warning(
                "packed weights cannot be kept, so %s is packed in memory at every load: %s; "
                "set %s to another folder, or to off",
                graph.path,
                error,
                CACHE_VARIABLE,
            )
    session = graph.open(options, fall_back=settings.cached and not settings.exact)
    return_freed_memory()
    return session


def _save_packed(ort: Any, graph: SessionGraph, options: Callable[[], Any], folder: Path) -> None:
    """Save a graph and its packed weights as MODEL_FILE and DATA_FILE of a folder.

    In two steps, so that memory holds the weights transposed or packed, and not both.

    Raises:
        BackendError: If ONNX Runtime fails, or what it saved answers differently.
        OSError: If a file cannot be written.
    """
    saved, data = folder / MODEL_FILE, folder / "saved.bin"
    fused, unpacked = graph.fuse(options, folder)
    packing = options()
    packing.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
    expected = _answers(save(ort, fused, packing, saved, data))
    return_freed_memory()
    for made in (fused, unpacked):  # before the copy: the disk need not hold all three
        made.unlink()
    rewrite(saved, data, folder / DATA_FILE)
    data.unlink()
    found = _answers(load(ort, saved, options()))
    if not all(map(np.array_equal, expected, found)):
        raise BackendError(f"{saved} answers differently from the graph it was saved from")


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
        if TOTAL_LENGTH in entries:
            feeds[TOTAL_LENGTH] = np.array([tokens], np.int32)
        for name, entry in entries.items():
            if name not in feeds:
                _, heads, _, head_dim = entry.shape
                feeds[name] = np.zeros((1, heads, tokens, head_dim), np.float32)
        answers.append(session.run(["logits"], {name: feeds[name] for name in entries})[0])
    return answers


def _options(ort: Any, settings: SessionSettings, *, packed: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = str(EXACT_LEVEL if settings.exact else SERVED_LEVEL)
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    return options


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
