"""One timed request, through the same doors as a user's."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from qwen_runtime.backends.base import IntArray
from qwen_runtime.bench.model_clock import timed_calls
from qwen_runtime.bench.result import Run
from qwen_runtime.llm import LLM

__all__ = ["measure"]


def measure(llm: LLM, prompts: IntArray, new_tokens: int) -> Run:
    """Generate greedily, and note when tokens reach the reader.

    One row is read from `LLM.stream`, detokenised text included; several rows, and a bundle
    without a tokenizer, from a streamer of `LLM.generate`. End tokens are ignored and every
    processor is off, so that each row has exactly ``new_tokens``.

    Args:
        llm: An idle LLM.
        prompts: Token ids, [rows, length].
        new_tokens: Tokens to generate, at least two.

    Raises:
        CapacityError: If the rows do not fit the bundle or the memory.
        BackendError: If the engine fails.
    """
    settings = _greedy_only(llm, new_tokens)
    with timed_calls(llm) as clock:
        started = time.perf_counter()
        if len(prompts) == 1 and llm.tokenizer is not None:
            arrivals = []
            with llm.stream(prompts[0].tolist(), **settings) as stream:
                for chunk in stream.chunks():
                    arrivals += [time.perf_counter()] * len(chunk.token_ids)
        else:
            reader = _Reader()
            llm.generate(prompts, streamer=reader, **settings)
            arrivals = reader.arrivals
    return Run(
        arrivals_ms=tuple(1e3 * (arrival - started) for arrival in arrivals),
        prefill_model_ms=1e3 * clock.between(started, arrivals[0]),
        decode_model_ms=1e3 * clock.between(arrivals[0], arrivals[-1]),
    )


class _Reader:
    """A streamer that notes when each step's tokens arrive."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self._has_prompt = False

    def put(self, value: IntArray) -> None:
        """Receive the prompt, then the next token of every row."""
        if self._has_prompt:
            self.arrivals.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is held back."""


def _greedy_only(llm: LLM, new_tokens: int) -> dict[str, Any]:
    """Settings that switch off whatever the bundle's own set, and leave plain greedy decoding."""
    own = llm.generation_config
    fields = (field.name for field in dataclasses.fields(own))
    off = {name: None for name in fields if getattr(own, name) is not None}
    return {**off, "do_sample": False, "max_new_tokens": new_tokens}
