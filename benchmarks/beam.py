"""Beam search against the bare model at the same batch: what the search itself costs.

    python benchmarks/beam.py [--beams 4] [--steps 64] [--runs 9]
    python benchmarks/beam.py --shape Qwen2.5-0.5B --layers 4 --steps 16

Both sides prefill one row and run ``steps - 1`` decode calls of ``beams`` rows at the same
lengths. The model alone takes whatever tokens; the search chooses them, moves cache rows and
keeps its books. Measured in turn; the ratio is the median of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from common import pairs, report
from random_checkpoint import SHAPES, write_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_runtime import LLM
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape")
    parser.add_argument("--layers", type=int, help="layers of that shape; all by default")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=64, help="tokens to generate")
    parser.add_argument("--runs", type=int, default=9, help="pairs of measurements")
    parser.add_argument("--threads", type=int, help="threads of an operator; one per core")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = None
        if args.shape is not None:
            model = Path(scratch, "checkpoint")
            write_checkpoint(args.shape, model, seed=0, dtype="bf16", layers=args.layers)
        bundle = build(model, Path(scratch, "bundle"), BuildOptions(verify=False))
        result = measure(bundle, args)
    report(result, args.as_json)


def measure(bundle: Bundle, args: argparse.Namespace) -> dict[str, object]:
    prompt = np.random.default_rng(0).integers(0, 1000, args.prompt).tolist()
    runner = OnnxRuntimeRunner(bundle, threads=args.threads)
    runner.allocate(args.beams, args.prompt + args.steps)
    llm = LLM(bundle, threads=args.threads)

    def model_alone() -> float:
        started = time.perf_counter()
        runner.prefill([0], [np.array(prompt)], [0], [1])
        for slot in range(1, args.beams):
            runner.copy(0, slot, args.prompt)
        for _ in range(args.steps - 1):
            runner.decode(range(args.beams), [1] * args.beams)
        return time.perf_counter() - started

    def search() -> float:
        started = time.perf_counter()
        output = llm.generate(
            prompt,
            num_beams=args.beams,
            max_new_tokens=args.steps,
            eos_token_id=None,
            pad_token_id=None,
            do_sample=False,
            repetition_penalty=1.0,
        )
        seconds = time.perf_counter() - started
        assert len(output.token_ids) == args.steps
        return seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        search()
        model_alone()
        measured = pairs(search, model_alone, args.runs)
    result: dict[str, object] = {
        "model": bundle.manifest.source,
        "vocab": bundle.manifest.model.vocab_size,
        "beams": args.beams,
        "steps": args.steps,
        "threads": args.threads or "one per core",
        "search_ms_per_step": 1e3 * statistics.median(ours for ours, _ in measured) / args.steps,
        "model_ms_per_step": 1e3 * statistics.median(m for _, m in measured) / args.steps,
        "search_over_model": statistics.median(ours / model for ours, model in measured),
        "pairs": len(measured),
    }
    llm.close()
    runner.close()
    return result


if __name__ == "__main__":
    main()
