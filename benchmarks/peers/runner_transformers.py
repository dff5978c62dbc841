"""transformers on PyTorch's CPU kernels."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from worker import FloatArray, IntArray

__all__ = ["Runner"]


class Runner:
    """A checkpoint, with its own dynamic cache.

    Args:
        path: The checkpoint.
        threads: Of one operator.
        capacity: Unused: the cache grows by itself.
        dtype: Name of the type of weights and activations in torch.
        attention: Name of an attention implementation of transformers.
    """

    def __init__(
        self, path: Path, threads: int, capacity: int, *, dtype: str, attention: str
    ) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()
        self._cache: Any = None
        self.vocab_size = self._model.config.vocab_size
        self.versions = {name: metadata.version(name) for name in ("transformers", "torch")}

    def prefill(self, ids: IntArray, room: int) -> FloatArray:
        """See `worker.Runner.prefill`."""
        self._cache = None
        return self._call(ids)

    def decode(self, token: int) -> FloatArray:
        """See `worker.Runner.decode`."""
        return self._call(np.array([token]))

    def _call(self, ids: IntArray) -> FloatArray:
        with torch.inference_mode():
            output = self._model(
                torch.from_numpy(ids[None]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self._cache = output.past_key_values
            logits: FloatArray = output.logits[0, -1].float().numpy()
        return logits
