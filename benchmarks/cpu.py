"""Decode and prefill on the CPU against transformers (eager), in one run.

    python benchmarks/cpu.py --shape Qwen2.5-0.5B --prompts 128 900
    python benchmarks/cpu.py --precision int8 --theirs bf16

Random weights; both sides run the same ids. Medians of pairs measured in turn. It also prints how
long our side takes to load and the memory it holds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import median_ratio, memory, pairs, report
from random_checkpoint import SHAPES, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="Qwen2.5-0.5B")
    parser.add_argument("--precision", choices=("fp32", "int8", "int4"), default="fp32")
    parser.add_argument("--theirs", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 900])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = {
        "shape": args.shape,
        "precision": args.precision,
        "transformers": args.theirs,
        "threads": args.threads,
    }
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, bundle = Path(scratch, "checkpoint"), Path(scratch, "bundle")
        write_checkpoint(args.shape, checkpoint, seed=0, dtype="bf16")
        # In children: this process's memory must not hold what building needs.
        _in_child(_build, checkpoint, bundle, args.precision)
        os.environ["QWEN_EXPORT_CACHE"] = str(Path(scratch, "cache"))
        _in_child(_fill_cache, bundle)
        result |= _in_child(_our_memory, bundle, args.threads)
        result |= _in_child(_speed, checkpoint, bundle, args)
    report(result, args.as_json)


_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def _in_child(function, *arguments):  # type: ignore[no-untyped-def]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _build(checkpoint: Path, bundle: Path, precision: str) -> None:
    from qwen_export.bundle import BuildOptions, build

    build(checkpoint, bundle, BuildOptions(precision=precision, verify=False))


def _fill_cache(bundle: Path) -> None:
    """Load once: a quantised bundle's packed weights are saved then, and mapped from there on."""
    from qwen_runtime import LLM

    LLM(bundle).close()


def _our_memory(bundle: Path, threads: int) -> dict[str, object]:
    from qwen_runtime import LLM

    before = memory()
    started = time.monotonic()
    llm = LLM(bundle, threads=threads)
    seconds = time.monotonic() - started
    llm.generate([1, 2, 3], do_sample=False, max_new_tokens=4)
    after = memory()
    weights = (bundle / "weights.bin").stat().st_size / 1e6
    return {
        "load (s)": seconds,
        "weights.bin (MB)": weights,
        "anonymous memory / weights": (after["anonymous"] - before["anonymous"]) / weights,
        "peak memory (VmHWM) / weights": (after["peak"] - before["resident"]) / weights,
    }


def _speed(checkpoint: Path, bundle: Path, args: argparse.Namespace) -> dict[str, object]:
    import torch
    from transformers import AutoModelForCausalLM

    from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
    from qwen_runtime.bundle import Bundle

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, _DTYPES[args.theirs]), attn_implementation="eager"
    ).eval()
    runner = OnnxRuntimeRunner(Bundle.open(bundle), threads=args.threads)
    vocab_size = runner.limits.vocab_size
    result: dict[str, object] = {"our graph": runner.graph}
    for length in args.prompts:
        ids = np.random.default_rng(0).integers(0, vocab_size, length)
        runner.allocate(1, length + args.steps)

        def our_prefill(ids: np.ndarray = ids) -> float:
            started = time.perf_counter()
            runner.prefill([0], [ids], [0], [1])
            return time.perf_counter() - started

        def their_prefill(ids: np.ndarray = ids) -> float:
            with torch.no_grad():
                started = time.perf_counter()
                model(torch.from_numpy(ids[None]), logits_to_keep=1, use_cache=True)
                return time.perf_counter() - started

        def our_decode(ids: np.ndarray = ids) -> float:
            runner.prefill([0], [ids], [0], [1])
            started = time.perf_counter()
            for token in range(args.steps):
                runner.decode([0], [token])
            return (time.perf_counter() - started) / args.steps

        def their_decode(ids: np.ndarray = ids) -> float:
            with torch.no_grad():
                cache = model(torch.from_numpy(ids[None]), logits_to_keep=1).past_key_values
                started = time.perf_counter()
                for token in range(args.steps):
                    model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                return (time.perf_counter() - started) / args.steps

        our_prefill(), their_prefill()
        prefill = pairs(our_prefill, their_prefill, args.runs)
        decode = pairs(our_decode, their_decode, args.runs)
        result |= {
            f"prompt {length}: prefill ours (tok/s)": length / _median(prefill, 0),
            f"prompt {length}: prefill transformers (tok/s)": length / _median(prefill, 1),
            f"prompt {length}: prefill ratio": median_ratio(prefill),
            f"prompt {length}: decode ours (tok/s)": 1 / _median(decode, 0),
            f"prompt {length}: decode transformers (tok/s)": 1 / _median(decode, 1),
            f"prompt {length}: decode ratio": median_ratio(decode),
        }
    return result


def _median(measured: list[tuple[float, float]], side: int) -> float:
    return statistics.median(pair[side] for pair in measured)


if __name__ == "__main__":
    main()
