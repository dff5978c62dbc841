"""Load time and memory of quantised bundles: first load, later loads, and without the cache.

    python benchmarks/memory.py --precision int8 int4

Random weights. Each load runs in a process of its own: the first saves packed weights in a cache
folder made for it, the second maps them, the third packs in memory what the graph for the CPU takes,
which it writes to a temporary file. Then a prompt of 128 tokens and a few steps run. The KV cache is
counted in every figure and listed beside them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from common import memory, report
from random_checkpoint import SHAPES, write_checkpoint

PROMPT = 128
STEPS = 16
LOADS = {"first load": True, "later load": True, "no cache": False}
"""By name, in this order: whether the cache folder is used."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="Qwen2.5-0.5B")
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = {"shape": args.shape, "threads": args.threads}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch, "checkpoint")
        write_checkpoint(args.shape, checkpoint, seed=0, dtype="bf16")
        os.environ["QWEN_EXPORT_CACHE"] = str(Path(scratch, "cache"))
        for precision in args.precision:
            bundle = Path(scratch, precision)
            _in_child(_build, checkpoint, bundle, precision)
            result[f"{precision}: weights.bin (MB)"] = (
                bundle / "weights.bin"
            ).stat().st_size / 1e6
            for name, cached in LOADS.items():
                figures = _in_child(_measure, bundle, cached, args.threads)
                result |= {f"{precision}, {name}: {key}": value for key, value in figures.items()}
        saved = [path for path in Path(scratch, "cache").rglob("*") if path.is_file()]
        result["cache folder (MB)"] = sum(path.stat().st_size for path in saved) / 1e6
    report(result, args.as_json)


def _in_child(function, *arguments):  # type: ignore[no-untyped-def]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _build(checkpoint: Path, bundle: Path, precision: str) -> None:
    from qwen_export.bundle import BuildOptions, build

    build(checkpoint, bundle, BuildOptions(precision=precision, max_context=4096, verify=False))


def _measure(bundle: Path, cached: bool, threads: int) -> dict[str, object]:
    from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
    from qwen_runtime.bundle import Bundle

    before = memory()
    started = time.monotonic()
    runner = OnnxRuntimeRunner(Bundle.open(bundle), threads=threads, packed_cache=cached)
    load = time.monotonic() - started
    loaded = memory()
    runner.allocate(1, PROMPT + STEPS)
    runner.prefill([0], [np.arange(PROMPT)], [0], [1])
    for token in range(STEPS):
        runner.decode([0], [token])
    after = memory()
    return {
        "graph": runner.graph,
        "load (s)": load,
        "anonymous after load (MB)": loaded["anonymous"] - before["anonymous"],
        "anonymous in use (MB)": after["anonymous"] - before["anonymous"],
        "peak resident, VmHWM (MB)": after["peak"],
        "KV cache (MB)": runner.cache_bytes / 1e6,
    }


if __name__ == "__main__":
    main()
