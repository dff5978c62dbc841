"""llama.cpp through llama-cpp-python's low-level calls, so that no Python of theirs is timed."""

from __future__ import annotations

import ctypes
from importlib import metadata
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from worker import FloatArray, IntArray

__all__ = ["Runner"]

_MICRO_BATCH = 512


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(level: int, text: bytes, data: Any) -> None:
    """Drop what llama.cpp would print while it loads."""


class Runner:
    """A GGUF file, mapped; the prompt goes in one call, logits of its last token come out.

    Args:
        path: The file.
        threads: For decoding and for prompts.
        capacity: Tokens of the context.
        flash_attention: On or off.
        repack: Lay quantised weights out anew for this CPU's kernels, in memory of their own.
    """

    def __init__(
        self, path: Path, threads: int, capacity: int, *, flash_attention: bool, repack: bool
    ) -> None:
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        model_params.use_extra_bufts = repack
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp could not load the file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = capacity
        params.n_ubatch = _MICRO_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"{path}: llama.cpp could not make a context")
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        system = llama_cpp.llama_print_system_info().decode()
        features = [part.split(" = ")[0].removeprefix("CPU : ") for part in system.split(" | ")]
        self.versions = {
            "llama-cpp-python": metadata.version("llama-cpp-python"),
            "compiled for": " ".join(part for part in features if part),
        }

    def prefill(self, ids: IntArray, room: int) -> FloatArray:
        """See `worker.Runner.prefill`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return self._call(ids)

    def decode(self, token: int) -> FloatArray:
        """See `worker.Runner.decode`."""
        return self._call(np.array([token]))

    def _call(self, ids: IntArray) -> FloatArray:
        tokens = (llama_cpp.llama_token * len(ids))(*ids.tolist())
        status = llama_cpp.llama_decode(
            self._context, llama_cpp.llama_batch_get_one(tokens, len(ids))
        )
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))
