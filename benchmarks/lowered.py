"""The graph for the CPU against the portable one of the same bundle, run in turn.

    python benchmarks/lowered.py --bundle DIR [--rounds 6] [--json]

Each runs in a process of its own, on one int8 or int4 bundle, weights mapped from the packed cache
by both: decode steps of one row after 128, 900 and 3,000 tokens, of 8, 16 and 32 after 128, of 16
with caches for 1,024, and prompts of 128, 900 and 2,048 tokens. Milliseconds are medians, ratios
those of pairs, with the lowest and the highest, above 1 where the graph for the CPU is faster. Run
it on an idle machine; it warns when the load average says that it is not.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from common import median_ratio, pairs, report, warn_if_busy

from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle

STEPS = (
    *((1, length, 0) for length in (128, 900, 3000)),
    *((rows, 128, 0) for rows in (8, 16, 32)),
    (16, 128, 1024),
)
"""Rows, the tokens they hold, and the capacity of their caches where it is more than that takes."""
PROMPTS = (128, 900, 2048)
CALLS = 16
"""Decode steps of one measurement of one row; fewer of more rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    warn_if_busy()
    context = multiprocessing.get_context("spawn")
    result: dict[str, object] = {"bundle": args.bundle.name, "threads": args.threads}
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(context.Pool(1, open_runner, (args.bundle, args.threads, lowered)))
            for lowered in (True, False)
        ]
        graphs = [pool.apply(graph) for pool in pools]
        if graphs[0] == graphs[1]:
            sys.exit(f"{args.bundle} has no graph for the CPU: qwen-export engine --target cpu")
        for rows, length, capacity in STEPS:
            name = f"{rows} row{'s' * (rows > 1)} after {length}"
            name += f" of {capacity}, ms a step" if capacity else ", ms a step"
            result[name] = compare(pools, decode, (rows, length, capacity), args.rounds)
        for length in PROMPTS:
            result[f"prompt of {length}, ms"] = compare(pools, prefill, (length,), args.rounds)
    report(result, args.as_json)


def compare(
    pools: Sequence[Pool], run: Callable[..., float], size: tuple[int, ...], rounds: int
) -> str:
    """Milliseconds of both, and how many times as fast the first is."""
    ours, portable = (partial(pool.apply, run, size) for pool in pools)
    ours(), portable()
    measured = pairs(ours, portable, rounds)
    medians = [statistics.median(each) for each in zip(*measured, strict=True)]
    ratios = [b / a for a, b in measured]
    return (
        f"portable {medians[1]:.1f}, for the CPU {medians[0]:.1f}, "
        f"ratio {median_ratio(measured):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    )


_runner: OnnxRuntimeRunner
"""Of this process."""


def open_runner(bundle: Path, threads: int, lowered: bool) -> None:
    """Open this process's runner."""
    global _runner
    _runner = OnnxRuntimeRunner(Bundle.open(bundle), threads=threads, lowered=lowered)


def graph() -> str:
    """The file that this process runs."""
    return _runner.graph


def decode(rows: int, length: int, capacity: int) -> float:
    """Milliseconds of a decode step of some rows that hold so many tokens."""
    slots, calls = list(range(rows)), max(CALLS // rows, 4)
    _runner.allocate(rows, max(length + CALLS, capacity))
    for slot in slots:
        _runner.truncate(slot, length)
    started = time.perf_counter()
    for _ in range(calls):
        _runner.decode(slots, [5] * rows)
    return 1e3 * (time.perf_counter() - started) / calls


def prefill(length: int) -> float:
    """Milliseconds of a prompt in an empty slot."""
    prompt = np.arange(length, dtype=np.int64) % 1000
    _runner.allocate(1, length)
    started = time.perf_counter()
    _runner.prefill([0], [prompt], [0], [1])
    return 1e3 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
