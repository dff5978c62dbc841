"""Time from logits to token: this runtime's NumPy sampling against transformers' processors.

    python benchmarks/sampling.py [--vocab 151936] [--context 500] [--pairs 60] [--json]

Both sides process the same float32 logits of one sequence with the same context and draw one
token. Ours and theirs run in turn, so that each ratio is of two neighbouring measurements; the
printed times and ratios are medians. torch runs with one thread and with its default.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers.generation import logits_process as reference

from qwen_runtime import sampling

QWEN_DEFAULTS: dict[str, Any] = {
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
}
CHAINS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, repetition 1.05": {"repetition_penalty": 1.05},
    "Qwen2.5 defaults": QWEN_DEFAULTS,
    "Qwen2.5 defaults, rng torch": QWEN_DEFAULTS,
    "temperature, top_p 0.8, no top_k": {"temperature": 0.7, "top_p": 0.8},
    "temperature only": {"temperature": 0.7},
}
CLASSES = {
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
    "temperature": "TemperatureLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
}


def ours(name: str, chain: dict[str, Any], ids: Any) -> Callable[[Any], int]:
    generator = None
    if not name.startswith("greedy"):
        generator = sampling.make_generator("torch" if "torch" in name else "default", 0)
    processors = [getattr(sampling, CLASSES[key])(value) for key, value in chain.items()]
    selector = sampling.TokenSelector(processors, generator=generator)
    return lambda logits: selector.select(ids, logits)[0]


def theirs(name: str, chain: dict[str, Any], ids: Any) -> Callable[[Any], int]:
    processors = reference.LogitsProcessorList(
        [getattr(reference, CLASSES[key])(value) for key, value in chain.items()]
    )
    input_ids = torch.from_numpy(ids)[None]

    def step(logits: Any) -> int:
        scores = processors(input_ids, torch.from_numpy(logits)[None])
        if name.startswith("greedy"):
            return int(torch.argmax(scores, dim=-1))
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1))

    return step


def time_ms(step: Callable[[Any], int], logits: Any) -> float:
    start = time.perf_counter()
    step(logits)
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, rows: list[Any], ids: Any, pairs: int) -> dict[str, Any]:
    chain = CHAINS[name]
    mine, other = ours(name, chain, ids), theirs(name, chain, ids)
    for row in rows[:3]:
        mine(row)
        other(row)
    times = [(time_ms(mine, row), time_ms(other, row)) for row in (rows * pairs)[:pairs]]
    return {
        "chain": name,
        "ours_ms": statistics.median(t[0] for t in times),
        "transformers_ms": statistics.median(t[1] for t in times),
        "ratio": statistics.median(t[1] / t[0] for t in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936, help="number of logits")
    parser.add_argument("--context", type=int, default=500, help="ids of prompt and output so far")
    parser.add_argument("--pairs", type=int, default=60, help="measurements of each side")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()

    source = np.random.default_rng(0)
    ids = source.integers(0, arguments.vocab, arguments.context)
    rows = [(3 * source.standard_normal(arguments.vocab)).astype(np.float32) for _ in range(20)]
    environment = {
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vocab": arguments.vocab,
        "context": arguments.context,
        "pairs": arguments.pairs,
    }
    default_threads = torch.get_num_threads()
    results = []
    for threads in sorted({1, default_threads}):
        torch.set_num_threads(threads)
        for name in CHAINS:
            result = measure(name, rows, ids, arguments.pairs)
            results.append({"torch_threads": threads, **result})
    if arguments.json:
        print(json.dumps({"environment": environment, "results": results}))
        return
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    print(f"{'one row, median ms':36}{'torch threads':>14}{'ours':>9}{'theirs':>9}{'ratio':>8}")
    for result in results:
        print(
            f"{result['chain']:36}{result['torch_threads']:14}{result['ours_ms']:9.3f}"
            f"{result['transformers_ms']:9.3f}{result['ratio']:7.1f}x"
        )


if __name__ == "__main__":
    main()
