"""Our own runtime, as `qwen_runtime.LLM` uses it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
from worker import FloatArray, IntArray

from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle

__all__ = ["Runner"]


class Runner:
    """A bundle on ONNX Runtime's CPU provider, with what `LLM` sets by itself."""

    def __init__(self, path: Path, threads: int, capacity: int) -> None:
        self._runner = OnnxRuntimeRunner(Bundle.open(path), threads=threads)
        self.vocab_size = self._runner.limits.vocab_size
        packages = ("qwen-export", "onnxruntime", "numpy")
        # The graph for the CPU where the bundle has one.
        self.versions = {"graph": self._runner.graph} | {
            name: metadata.version(name) for name in packages
        }

    def prefill(self, ids: IntArray, room: int) -> FloatArray:
        """See `worker.Runner.prefill`. Caches get the size that such a request gives them."""
        if self._runner.num_slots:
            self._runner.truncate(0, 0)
        self._runner.allocate(1, len(ids) + room)
        [logits] = self._runner.prefill([0], [ids], [0], [1])
        return np.asarray(logits[-1], np.float32)

    def decode(self, token: int) -> FloatArray:
        """See `worker.Runner.decode`."""
        return np.asarray(self._runner.decode([0], [token])[0], np.float32)
