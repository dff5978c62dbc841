"""Which part of a run is spent in the model, as opposed to everything around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from qwen_runtime.backends.base import FloatArray, IntArray, ModelRunner
from qwen_runtime.llm import LLM

__all__ = ["ModelClock", "graph_of", "timed_calls"]


class ModelClock:
    """A `ModelRunner` that passes everything on and notes when each call began and ended.

    Args:
        runner: What executes the graphs.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._calls: list[tuple[float, float]] = []

    def between(self, start: float, stop: float) -> float:
        """Seconds of the calls that ended between two readings of ``time.perf_counter``."""
        return sum(ended - began for began, ended in self._calls if start < ended <= stop)

    def prefill(
        self,
        slots: Sequence[int],
        tokens: Sequence[IntArray],
        past: Sequence[int],
        want: Sequence[int],
    ) -> list[FloatArray]:
        """See `ModelRunner.prefill`."""
        began = time.perf_counter()
        logits = self._runner.prefill(slots, tokens, past, want)
        self._calls.append((began, time.perf_counter()))
        return logits

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """See `ModelRunner.decode`."""
        began = time.perf_counter()
        logits = self._runner.decode(slots, tokens)
        self._calls.append((began, time.perf_counter()))
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


def graph_of(llm: LLM) -> str | None:
    """The file in its bundle that an LLM's prompts run on; None where its engine names none."""
    graph: str | None = getattr(llm._engine.model._runner, "graph", None)
    return graph


@contextmanager
def timed_calls(llm: LLM) -> Iterator[ModelClock]:
    """Time an LLM's model calls within a ``with`` block.

    Costs two clock readings a call. No request may run while the block is entered or left.
    """
    model = llm._engine.model
    runner = model._runner
    clock = ModelClock(runner)
    model._runner = clock
    try:
        yield clock
    finally:
        model._runner = runner
