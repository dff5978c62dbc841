"""onnxruntime-genai, with a model from its own builder."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
from worker import FloatArray, IntArray

__all__ = ["Runner"]


class Runner:
    """A folder of the model builder, greedy, key-value buffers shared by past and present.

    Args:
        path: The folder.
        threads: For one operator.
        capacity: Unused: a generator takes as many tokens as its request needs.
        chunk_size: Tokens of a prompt that run at once; None for all of them.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        capacity: int,
        *,
        chunk_size: int | None,
    ) -> None:
        config = og.Config(str(path))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        overlay: dict[str, Any] = {"model": {"decoder": {"session_options": options}}}
        if chunk_size:
            overlay["search"] = {"chunk_size": chunk_size}
        config.overlay(json.dumps(overlay))
        self._model = og.Model(config)
        self._generator: Any = None
        settings = json.loads((path / "genai_config.json").read_text())
        self.vocab_size = settings["model"]["vocab_size"]
        self.versions = {
            name: metadata.version(name) for name in ("onnxruntime-genai", "onnxruntime")
        }

    def prefill(self, ids: IntArray, room: int) -> FloatArray:
        """See `worker.Runner.prefill`."""
        self._generator = None  # gives its buffers back before the next one takes some
        params = og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=len(ids) + room)
        self._generator = og.Generator(self._model, params)
        return self._append(ids)

    def decode(self, token: int) -> FloatArray:
        """See `worker.Runner.decode`."""
        return self._append(np.array([token]))

    def _append(self, ids: IntArray) -> FloatArray:
        self._generator.append_tokens(ids.astype(np.int32))
        logits = np.asarray(self._generator.get_logits(), np.float32)
        return logits.reshape(-1, logits.shape[-1])[-1]
