"""The graph for the CPU against the portable one of the same bundle, run in turn.

    python benchmarks/lowered.py --bundle DIR [--rounds 6] [--json]

Two runners over one int8 or int4 bundle, weights mapped from the packed cache by both: decode steps
of one row after 128 and 900 tokens, of 8, 16 and 32 rows after 128, and prompts of 128, 512 and 900
tokens. Milliseconds are medians, ratios those of pairs, above 1 where the graph for the CPU is
faster. Run it on an idle machine; it warns when the load average says that it is not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import median_ratio, pairs, report

from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle

STEPS = {1: (128, 900), 8: (128,), 16: (128,), 32: (128,)}
"""Rows to the tokens they hold."""
PROMPTS = (128, 512, 900)
CALLS = 16
"""Decode steps of one measurement of one row; fewer of more rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    if os.getloadavg()[0] > 0.5:
        print(f"warning: load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    bundle = Bundle.open(args.bundle)
    runners = [
        OnnxRuntimeRunner(bundle, threads=args.threads, lowered=lowered)
        for lowered in (True, False)
    ]
    if runners[0].graph == runners[1].graph:
        sys.exit(f"{args.bundle} has no graph for the CPU: qwen-export engine --target cpu")
    result: dict[str, object] = {"bundle": args.bundle.name, "threads": args.threads}
    for rows, lengths in STEPS.items():
        for length in lengths:
            name = f"{rows} row{'s' * (rows > 1)} after {length}, ms a step"
            result |= compare(name, [decoding(r, rows, length) for r in runners], args.rounds)
    for length in PROMPTS:
        timed = [prefilling(r, length) for r in runners]
        result |= compare(f"prompt of {length}, ms", timed, args.rounds)
    report(result, args.as_json)


def compare(name: str, timed: list[Callable[[], float]], rounds: int) -> dict[str, object]:
    """Two figures and their ratio."""
    for run in timed:
        run()
    measured = pairs(timed[0], timed[1], rounds)
    ours, portable = (statistics.median(each) for each in zip(*measured, strict=True))
    ratio = median_ratio(measured)
    return {name: f"portable {portable:.1f}, for the CPU {ours:.1f}, ratio {ratio:.2f}"}


def decoding(runner: OnnxRuntimeRunner, rows: int, length: int) -> Callable[[], float]:
    """Times decode steps of some rows that hold so many tokens."""
    slots, calls = list(range(rows)), max(CALLS // rows, 4)

    def run() -> float:
        runner.allocate(rows, length + CALLS)
        for slot in slots:
            runner.truncate(slot, length)
        started = time.perf_counter()
        for _ in range(calls):
            runner.decode(slots, [5] * rows)
        return 1e3 * (time.perf_counter() - started) / calls

    return run


def prefilling(runner: OnnxRuntimeRunner, length: int) -> Callable[[], float]:
    """Times a prompt in an empty slot."""
    prompt = np.arange(length, dtype=np.int64) % 1000

    def run() -> float:
        runner.allocate(1, length)
        started = time.perf_counter()
        runner.prefill([0], [prompt], [0], [1])
        return 1e3 * (time.perf_counter() - started)

    return run


if __name__ == "__main__":
    main()
