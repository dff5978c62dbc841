"""What the KV cache costs and saves: limits, capacities, growth, and prompts that begin alike.

    python benchmarks/kv.py [--shape Qwen2.5-0.5B --layers 4] [--precision int8] [--cpu-time] [--json]

Without a shape it measures the embedded model. fp32 runs the portable graph, whose attention costs by
capacity, int8 and int4 the graph for the CPU, where it costs by length. Two bundles of one checkpoint differ only in their
limit, 256 and 8,192 tokens: their decode steps are run in turn at the same length. Then one runner
decodes at one length with more and more capacity, and grows: from both follows what each growth
step costs per token. Last, two `LLM`s answer the same prompts in turn, one with reuse and one
without: a shared beginning of 900 tokens, and the next turn of a conversation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from common import median_ratio, pairs, report
from random_checkpoint import SHAPES, write_checkpoint

from qwen_export.bundle import BuildOptions, build, embedded_model
from qwen_runtime import LLM, cache
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle

SLACKS = (0, 64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: the embedded model")
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--precision", choices=("fp32", "int8", "int4"), default="fp32")
    parser.add_argument("--steps", type=int, default=40, help="decode steps per measurement")
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--length", type=int, default=1000, help="tokens held while growing")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time of one thread instead of wall time: for a machine that is not quiet",
    )
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    args.now = time.process_time if args.cpu_time else time.perf_counter
    result: dict[str, object] = {
        "clock": args.now.__name__,
        "model": args.shape or "embedded",
        "layers": args.layers or "all",
        "precision": args.precision,
        "threads": args.threads,
    }
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["QWEN_EXPORT_CACHE"] = str(Path(scratch, "cache"))
        checkpoint = embedded_model()
        if args.shape:
            checkpoint = Path(scratch, "checkpoint")
            write_checkpoint(args.shape, checkpoint, layers=args.layers)
        bundles = []
        for limit in (256, 8192):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the embedded model was trained on less
                options = BuildOptions(args.precision, max_context=limit, verify=False)
                bundles.append(build(checkpoint, Path(scratch, str(limit)), options).path)
        result |= _limits(bundles, args)
        result |= _growth(bundles[1], args)
        result |= _reuse(bundles[1], args)
    report(result, args.as_json)


def _limits(bundles: list[Path], args: argparse.Namespace) -> dict[str, object]:
    """Steps at lengths 160, 161, ... of both bundles, one of each in turn."""
    runners = [OnnxRuntimeRunner(Bundle.open(path), threads=args.threads) for path in bundles]
    ids = _ids(runners[0].limits.vocab_size, 160)
    for runner in runners:
        runner.allocate(1, 1)
        runner.prefill([0], [ids], [0], [1])

    def step(runner: OnnxRuntimeRunner) -> float:
        started = args.now()
        runner.decode([0], [7])
        return args.now() - started

    for runner in runners:
        step(runner)
    measured = pairs(lambda: step(runners[0]), lambda: step(runners[1]), 90)
    capacities, graph = [runner.capacity for runner in runners], runners[0].graph
    for runner in runners:
        runner.close()
    return {
        "limit 256: ms/step": 1000 * statistics.median(pair[0] for pair in measured),
        "limit 8,192: ms/step": 1000 * statistics.median(pair[1] for pair in measured),
        "limit 8,192 / limit 256": median_ratio(measured),
        "capacities": capacities,
        "graph": graph,
    }


def _growth(bundle: Path, args: argparse.Namespace) -> dict[str, object]:
    """Step and growth times by capacity, one slot of ``--length`` tokens."""
    step_size, cache.GROWTH_STEP = cache.GROWTH_STEP, 8
    runner = OnnxRuntimeRunner(Bundle.open(bundle), threads=args.threads)
    ids = _ids(runner.limits.vocab_size, args.length)
    steps: dict[int, list[float]] = {slack: [] for slack in SLACKS}
    grown: dict[int, list[float]] = {slack: [] for slack in SLACKS[1:]}
    prefills = []
    for _ in range(args.runs):
        runner.truncate(0, 0)
        runner.allocate(1, 1)
        started = args.now()
        runner.prefill([0], [ids], [0], [1])
        prefills.append(args.now() - started)
        for slack in SLACKS:
            started = args.now()
            runner.grow(args.length + args.steps + slack)
            runner.truncate(0, args.length)
            runner.decode([0], [7])  # binds the buffers, touches them
            first = args.now() - started
            times = []
            for token in range(args.steps):
                started = args.now()
                runner.decode([0], [token])
                times.append(args.now() - started)
            steps[slack].append(statistics.median(times))
            if slack:
                grown[slack].append(first - statistics.median(times))
            runner.truncate(0, args.length)
    runner.close()
    cache.GROWTH_STEP = step_size
    medians = {slack: statistics.median(values) for slack, values in steps.items()}
    slope = float(np.polyfit(list(medians), list(medians.values()), 1)[0])
    growth = statistics.median(value for values in grown.values() for value in values)
    per_token = statistics.median(prefills) / args.length
    return {
        f"length {args.length}: ms/step by spare capacity": _ms(medians),
        "ms/step per 1,000 tokens of capacity": slope * 1e6,
        "ms for one growth": growth * 1e3,
        # On average half of the step lies idle, and it is paid for once.
        "ms/token by growth step": _ms(
            {size: slope * size / 2 + growth / size for size in (32, *SLACKS[1:])}
        ),
        "steps at a token's capacity that cost its prefill": per_token / slope,
    }


def _reuse(bundle: Path, args: argparse.Namespace) -> dict[str, object]:
    """Time to the first token, after others of the same beginning were answered."""
    result: dict[str, object] = {}
    with (
        LLM(bundle, threads=args.threads) as reusing,
        LLM(bundle, threads=args.threads, prefix_cache_slots=0) as plain,
    ):
        vocab_size = reusing.bundle.manifest.model.vocab_size
        shared = _ids(vocab_size, 900).tolist()
        turns = iter(range(10**6))

        def first_token(llm: LLM, prompt: list[int]) -> float:
            started = args.now()
            llm.generate(prompt, max_new_tokens=1, do_sample=False)
            return args.now() - started

        def ask(llm: LLM) -> float:
            return first_token(llm, [*shared, *_ids(vocab_size, 30, next(turns)).tolist()])

        def next_turn(llm: LLM) -> float:
            """60 tokens are answered, then 30 more are asked."""
            prompt = [*shared, *_ids(vocab_size, 30, next(turns)).tolist()]
            said = llm.generate(prompt, max_new_tokens=60, min_new_tokens=60, do_sample=False)
            return first_token(llm, [*prompt, *said.token_ids, *shared[:30]])

        ask(reusing), ask(plain)
        for name, action in (("shared 900 + 30", ask), ("next turn, 60 + 30", next_turn)):
            runs = pairs(lambda f=action: f(reusing), lambda f=action: f(plain), args.runs)
            result |= {
                f"{name}: first token (ms)": 1000 * statistics.median(run[0] for run in runs),
                f"{name}: without reuse (ms)": 1000 * statistics.median(run[1] for run in runs),
                f"{name}: times faster": median_ratio(runs),
            }
    return result


def _ids(vocab_size: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, count)


def _ms(seconds: dict[int, float]) -> dict[int, float]:
    return {key: round(1000 * value, 3) for key, value in seconds.items()}


if __name__ == "__main__":
    main()
