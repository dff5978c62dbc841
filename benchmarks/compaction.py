"""What it brings that running rows move together: the tail of a load, with and without moves.

    python benchmarks/compaction.py --bundle DIR [--requests 32] [--rounds 2] [--json]

So many requests with outputs uniform in 8..256 start at once and end one by one, while nothing
comes after them. The same ones run in turn with rows left where they are. Medians of decode steps
in ms once rows end, by the number that runs, without the moves between steps, and seconds of the
whole with them. Run it on an idle machine; it warns when the load average says that it is not.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
from common import pairs, report, warn_if_busy

from qwen_runtime import LLM, AsyncLLM
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.engine.compaction import Compactor

SHORTEST, LONGEST, PROMPT = 8, 256, 32
SHOWN = (2, 4, 8, 12, 16, 20, 24, 28)
"""Rows of a step; steps of one row more count with them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    warn_if_busy()
    steps: dict[bool, dict[int, list[float]]] = {m: defaultdict(list) for m in (True, False)}
    with LLM(args.bundle, max_num_seqs=args.requests, prefix_cache_slots=0) as llm:
        llm.generate([1] * PROMPT, max_new_tokens=8, do_sample=False)  # warm-up
        measured = pairs(
            lambda: load(llm, args.requests, steps[True], moved=True),
            lambda: load(llm, args.requests, steps[False], moved=False),
            args.rounds,
        )
    result: dict[str, object] = {
        f"{rows} rows, ms a step": " against ".join(
            f"{statistics.median(steps[moved][rows] + steps[moved][rows + 1]):.0f}"
            for moved in (True, False)
        )
        for rows in SHOWN
        if all(steps[moved][rows] + steps[moved][rows + 1] for moved in (True, False))
    }
    ours, left = (statistics.median(each) for each in zip(*measured, strict=True))
    result["whole load, s"] = f"{ours:.1f} against {left:.1f} where rows stay"
    report(result, args.as_json)


def load(llm: LLM, requests: int, steps: dict[int, list[float]], *, moved: bool) -> float:
    """Seconds of a load; adds its decode steps' milliseconds, by number of rows."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(SHORTEST, LONGEST + 1, requests).tolist()
    asked = rng.integers(0, llm.bundle.manifest.model.vocab_size, (requests, PROMPT)).tolist()
    decode = OnnxRuntimeRunner.decode

    most = 0

    def timed(runner, slots, tokens):  # type: ignore[no-untyped-def]
        nonlocal most
        started = time.perf_counter()
        logits = decode(runner, slots, tokens)
        most = max(most, len(slots))
        if len(slots) < most:  # prompts have come in, and some have ended
            steps[len(slots)].append(1e3 * (time.perf_counter() - started))
        return logits

    async def run() -> None:
        service = AsyncLLM(llm)
        greedy = {"do_sample": False, "eos_token_id": None, "repetition_penalty": 1.0}
        await asyncio.gather(
            *(
                service.generate(prompt, max_new_tokens=length, **greedy)
                for prompt, length in zip(asked, lengths, strict=True)
            )
        )

    started = time.perf_counter()
    with patch.object(OnnxRuntimeRunner, "decode", timed):
        if moved:
            asyncio.run(run())
        else:
            with patch.object(Compactor, "due", return_value=False):
                asyncio.run(run())
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
