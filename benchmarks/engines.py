"""What TensorRT engines take to build, and what is in them. Needs no GPU; nothing is executed.

    python benchmarks/engines.py [Qwen2.5-0.5B] [--layers 24]

Every engine is built in a process of its own, with default options and without the engine cache,
from a bundle of the embedded model or of a random checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import report
from random_checkpoint import SHAPES, write_checkpoint

CASES = (("fp32", "bf16"), ("fp32", "fp16"), ("int8", "bf16"), ("int4", "bf16"))
"""Weights of the bundle, compute type of the engine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES), nargs="?", help="default: embedded model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--target", default="tensorrt-rtx")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = {"model": args.shape or "embedded"}
    with tempfile.TemporaryDirectory() as scratch:
        model = []
        if args.shape is not None:
            model = [str(Path(scratch, "checkpoint"))]
            write_checkpoint(args.shape, Path(model[0]), seed=0, dtype="bf16", layers=args.layers)
        for precision in dict.fromkeys(weights for weights, _ in CASES):
            bundle = Path(scratch, precision)
            _run("build", *model, "-o", bundle, "--precision", precision, "--no-verify")
            for compute in (to for weights, to in CASES if weights == precision):
                engine = ["engine", bundle, "--target", args.target, "--compute-dtype", compute]
                seconds, peak = _run(*engine, "--overwrite")
                description = bundle / "engines" / args.target / "engine.json"
                figures = _figures(json.loads(description.read_text("utf-8")))
                result |= {
                    f"{precision} -> {compute}: {name}": value
                    for name, value in {
                        "seconds": seconds,
                        "peak RSS (MB)": peak,
                        **figures,
                    }.items()
                }
    report(result, args.as_json)


def _run(*arguments: str | Path) -> tuple[float, float]:
    """Seconds and peak resident memory in MB of one command."""
    command = [sys.executable, "-m", "qwen_export", *map(str, arguments)]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "QWEN_EXPORT_CACHE": "off"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed; run it to see why")
    return time.monotonic() - started, usage.ru_maxrss / 1000


def _figures(engine: dict[str, Any]) -> dict[str, float]:
    (plan,) = engine["plans"]
    return {
        "plan (MB)": plan["num_bytes"] / 1e6,
        "weights in plan (MB)": plan["weight_bytes"] / 1e6,
        "weights in graph (MB)": plan["graph_weight_bytes"] / 1e6,
        **{
            f"scratch, {profile['name']} (MB)": profile["activation_bytes"] / 1e6
            for profile in plan["profiles"]
        },
    }


if __name__ == "__main__":
    main()
