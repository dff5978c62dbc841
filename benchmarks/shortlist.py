"""Choosing a token from the highest logits of a row: time, and how often they do not prove it.

    python benchmarks/shortlist.py --bundle DIR [--prompts 40] [--steps 100] [--json]

Time: sampling with Qwen2.5's defaults from all logits of a row and from its 64 highest, random
normal ones, 2,000 ids of context; processor time, medians of pairs. How often: the bundle goes on
from beginnings of the held-out texts with each setting, whole rows decide, and at every step the
highest few are tried as well. A refused row costs bringing it whole; no token depends on it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import median_ratio, pairs, report

from qwen_runtime import LLM
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.sampling import (
    PresencePenaltyLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TokenSelector,
    TopKLogitsWarper,
    TopPLogitsWarper,
    make_generator,
)

COUNTS = (64, 32, 24)
CONTEXT, VOCAB_SIZE, PAIRS = 2000, 151_936, 200
TEXTS = Path(__file__).parent / "data" / "held_out.jsonl"


def sampled(top_k: int, *penalties: Any) -> list[Any]:
    """Qwen2.5's other defaults around a top-k and penalties."""
    warpers = (TemperatureLogitsWarper(0.7), TopKLogitsWarper(top_k), TopPLogitsWarper(0.8))
    return [*penalties, *warpers]


SETTINGS: dict[str, Callable[[int], list[Any]]] = {
    "top-k 20, repetition 1.05": lambda _: sampled(20, RepetitionPenaltyLogitsProcessor(1.05)),
    "top-k 20, repetition 1.1": lambda _: sampled(20, RepetitionPenaltyLogitsProcessor(1.1)),
    "top-k 20, presence 1.5": lambda n: sampled(20, PresencePenaltyLogitsProcessor(1.5, n)),
    "top-k 50": lambda _: sampled(50),
    "greedy, repetition 1.1": lambda _: [RepetitionPenaltyLogitsProcessor(1.1)],
}
"""Processors after a prompt of so many tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = choosing_times()
    lines = TEXTS.read_text("utf-8").splitlines()[: args.prompts]
    with LLM(args.bundle) as llm:
        prompts = [llm.tokenizer.encode(json.loads(line))[:48] for line in lines]
    runner = OnnxRuntimeRunner(llm.bundle)
    runner.allocate(1, 48 + args.steps)
    for name, processors in SETTINGS.items():
        least = TokenSelector(processors(0), generator=make_generator("default", 0)).num_top or 0
        refused = {count: 0 for count in COUNTS if count > least}
        for seed, prompt in enumerate(prompts):
            generator = None if name.startswith("greedy") else make_generator("default", seed)
            selector = TokenSelector(processors(len(prompt)), generator=generator)
            follow(runner, selector, prompt, args.steps, refused)
        total = len(prompts) * args.steps
        result[f"refused, {name}"] = ", ".join(
            f"{number / total:.2%} at {count}" for count, number in refused.items()
        )
    report(result, args.as_json)


def follow(
    runner: OnnxRuntimeRunner,
    selector: TokenSelector,
    prompt: list[int],
    steps: int,
    refused: dict[int, int],
) -> None:
    """Go on from a prompt; count the steps whose highest logits prove nothing."""
    runner.truncate(0, 0)
    ids = np.array(prompt, np.int64)
    row = runner.prefill([0], [ids], [0], [1])[0][-1]
    for _ in range(steps):
        for count in refused:
            best = highest(row, count)
            refused[count] += selector.shorten(ids, row[best], best, len(row)) is None
        token, _ = selector.select(ids, row)
        ids = np.append(ids, token)
        row = runner.decode([0], [token])[0]


def choosing_times() -> dict[str, object]:
    """Microseconds a row, from all logits and from the highest."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB_SIZE, CONTEXT)
    row = (3 * rng.standard_normal(VOCAB_SIZE)).astype(np.float32)
    best = highest(row, COUNTS[0])
    values = row[best]
    selector = TokenSelector(
        SETTINGS["top-k 20, repetition 1.05"](0), generator=make_generator("default", 0)
    )

    def short() -> None:
        candidates = selector.shorten(ids, values, best, VOCAB_SIZE)
        assert candidates is not None
        selector.draw(candidates)

    whole = partial(selector.select, ids, row)
    short(), whole()
    measured = pairs(partial(microseconds, short), partial(microseconds, whole), PAIRS)
    few, all_ = (statistics.median(each) for each in zip(*measured, strict=True))
    return {
        "us a row, all logits": round(all_),
        f"us a row, the highest {COUNTS[0]}": round(few),
        "ratio": median_ratio(measured),
    }


def microseconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    work()
    return 1e6 * (time.process_time() - started)


def highest(row: Any, count: int) -> Any:
    """Ids of a row's highest logits, in any order."""
    return np.argpartition(row, -count)[-count:]


if __name__ == "__main__":
    main()
