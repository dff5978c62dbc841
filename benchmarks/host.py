"""Our own Python and NumPy time per step, without the model, at vocabulary 151,936.

    python benchmarks/host.py

The real engine, state machine and processors run over a runner whose graphs take no time: its
logits are drawn once. Limits: 0.5 ms greedy, 2 ms with the Qwen2.5 sampling defaults.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
from common import report

from qwen_runtime.backends.base import FloatArray, IntArray, Limits
from qwen_runtime.engine import Engine
from qwen_runtime.generation.prompts import PromptBatch
from qwen_runtime.generation.sample import SampleDecoding
from qwen_runtime.generation_config import GenerationConfig, resolve

VOCAB_SIZE = 151_936
QWEN_DEFAULTS = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "seed": 1,
}


class InstantRunner:
    """A runner that answers with prepared logits."""

    limits = Limits(VOCAB_SIZE, 32_768)
    num_slots = 1
    capacity = 32_768

    def __init__(self) -> None:
        self._logits = np.random.default_rng(0).normal(0, 3, (1, VOCAB_SIZE)).astype(np.float32)

    def allocate(self, slots: int, capacity: int) -> None:
        """Nothing to allocate."""

    def prefill(
        self,
        slots: Sequence[int],
        tokens: Sequence[IntArray],
        past: Sequence[int],
        want: Sequence[int],
    ) -> list[FloatArray]:
        """The prepared logits."""
        return [self._logits]

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """The prepared logits."""
        return self._logits

    def copy(self, src: int, dst: int, length: int) -> None:
        """Nothing to copy."""

    def truncate(self, slot: int, length: int) -> None:
        """Nothing to forget."""

    def grow(self, capacity: int) -> None:
        """Nothing to grow."""

    def close(self) -> None:
        """Nothing to release."""


def step_ms(settings: dict[str, object], steps: int) -> float:
    """Median time of `Engine.step` in milliseconds."""
    prompt = list(range(1000, 1500))
    config = resolve(
        None,
        GenerationConfig(),
        {"max_new_tokens": steps + 8, **settings},
        prompt_length=len(prompt),
        vocab_size=VOCAB_SIZE,
    )
    engine = Engine(InstantRunner())
    engine.submit(SampleDecoding(PromptBatch.single(prompt, VOCAB_SIZE), config))
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def process_seconds(*command: str) -> float:
    """Median wall time of a process, of five runs."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    idle = process_seconds("-c", "")
    result: dict[str, object] = {
        "greedy (ms/step)": step_ms({"do_sample": False}, args.steps),
        "Qwen2.5 defaults (ms/step)": step_ms(QWEN_DEFAULTS, args.steps),
        "python alone (s)": idle,
        "import qwen_runtime (s)": process_seconds("-c", "import qwen_runtime; qwen_runtime.LLM"),
        "qwen-run --help (s)": process_seconds("-m", "qwen_runtime", "--help"),
        "qwen-export --help (s)": process_seconds("-m", "qwen_export", "--help"),
    }
    report(result, args.as_json)


if __name__ == "__main__":
    main()
