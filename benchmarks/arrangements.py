"""Memory and speed of the ways to serve two graphs from one weights file with ONNX Runtime.

    python benchmarks/arrangements.py

One session over the prefill graph for both phases, or one session a graph; weights packed when a
session loads, or mapped from the file. Each arrangement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import median_ratio, memory, pairs, report
from random_checkpoint import SHAPES, write_checkpoint

ARRANGEMENTS = {
    "two sessions, packed": (True, True),
    "two sessions, mapped": (True, False),
    "one session, packed": (False, True),
    "one session, mapped": (False, False),
}
"""By name: whether decode has a session of its own, and whether weights are packed."""
PROMPT = 128
PAIRS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="Qwen2.5-0.5B")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = {"shape": args.shape, "threads": args.threads}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, bundle = Path(scratch, "checkpoint"), Path(scratch, "bundle")
        write_checkpoint(args.shape, checkpoint, seed=0, dtype="bf16")
        _in_child(_build, checkpoint, bundle)
        result["weights.bin (MB)"] = (bundle / "weights.bin").stat().st_size / 1e6
        for name, (two, packed) in ARRANGEMENTS.items():
            figures = _in_child(_measure, bundle, two, packed, args.steps, args.threads)
            result |= {f"{name}: {figure}": value for figure, value in figures.items()}
    report(result, args.as_json)


def _in_child(function, *arguments):  # type: ignore[no-untyped-def]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _build(checkpoint: Path, bundle: Path) -> None:
    from qwen_export.bundle import BuildOptions, build

    build(checkpoint, bundle, BuildOptions(max_context=4096, verify=False))


def _measure(bundle: Path, two: bool, packed: bool, steps: int, threads: int) -> dict[str, float]:
    import onnxruntime

    from qwen_runtime.bundle import Bundle
    from qwen_runtime.cache import KVCache

    opened = Bundle.open(bundle)
    model = opened.manifest.model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    before = memory()
    started = time.monotonic()

    def session(phase: str) -> Any:
        path = str(opened.file(f"{phase}.onnx"))
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    prefill = session("prefill")
    decode = session("decode") if two else prefill
    load = time.monotonic() - started
    loaded = memory()
    cache = KVCache(
        [f"{i}.{part}" for i in range(model.num_hidden_layers) for part in ("key", "value")],
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        dtype=np.float32,
        max_context=512,
    )
    cache.reserve(1, PROMPT + steps)

    def run(session: Any, ids: np.ndarray, past: int) -> float:
        io = session.io_binding()
        feeds = {"input_ids": ids, "past_lengths": np.array([past])}
        if session is prefill:
            feeds["logits_indices"] = np.array([[ids.shape[1] - 1]])
        for name, array in feeds.items():
            io.bind_cpu_input(name, array)
        for name, view in cache.rows(0, 1):
            place = ("cpu", 0, view.dtype, view.shape, view.ctypes.data)
            io.bind_input(f"past_key_values.{name}", *place)
            io.bind_output(f"present.{name}", *place)
        io.bind_output("logits", "cpu")
        started = time.perf_counter()
        session.run_with_iobinding(io)
        return time.perf_counter() - started

    prompt = np.random.default_rng(0).integers(0, model.vocab_size, (1, PROMPT))
    prefills = [run(prefill, prompt, 0) for _ in range(4)]
    decodes = [run(decode, np.array([[step]]), PROMPT + step) for step in range(steps)]
    after = memory()
    figures = {
        "load (s)": load,
        "anonymous after load (MB)": loaded["anonymous"] - before["anonymous"],
        "anonymous after use (MB)": after["anonymous"] - before["anonymous"],
        "peak resident, VmHWM (MB)": after["peak"],
        "decode (tok/s)": 1 / statistics.median(decodes[2:]),
        "prefill 128 (tok/s)": PROMPT / statistics.median(prefills[1:]),
    }
    if two and packed:
        token = np.array([[1]])
        measured = pairs(
            lambda: run(prefill, token, PROMPT), lambda: run(decode, token, PROMPT), PAIRS
        )
        figures["one token, decode graph / prefill graph (paired)"] = median_ratio(measured)
    return figures


if __name__ == "__main__":
    main()
