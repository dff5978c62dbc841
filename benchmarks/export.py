"""Peak memory and time of an export, and the size of what it writes.

    python benchmarks/export.py Qwen2.5-0.5B --layers 12 24
    python benchmarks/export.py Qwen2.5-7B --layers 28 --precision int4 int8

Every export runs in a process of its own, without verification, from a random checkpoint. The
second takes an hour and 25 GB of the temporary folder, which it gives back.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import report
from random_checkpoint import SHAPES, write_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES), nargs="?", default="Qwen2.5-0.5B")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = {"shape": args.shape}
    with tempfile.TemporaryDirectory() as scratch:
        for layers in args.layers:
            folder = Path(scratch, f"checkpoint-{layers}")
            write_checkpoint(args.shape, folder, seed=0, dtype="bf16", layers=layers)
            unique = _unique_parameters(folder)
            for precision in args.precision:
                output = Path(scratch, f"bundle-{layers}-{precision}")
                started = time.monotonic()
                peak = _export(folder, output, precision)
                seconds = time.monotonic() - started
                size = (output / "weights.bin").stat().st_size
                kind = f"{precision}, {layers} layers"
                result |= {
                    f"{kind}: peak RSS (MB)": peak / 1e6,
                    f"{kind}: seconds": seconds,
                    f"{kind}: weights.bin (MB)": size / 1e6,
                    f"{kind}: bytes a unique parameter": size / unique,
                }
                shutil.rmtree(output)
            shutil.rmtree(folder)
    report(result, args.as_json)


def _export(folder: Path, output: Path, precision: str) -> int:
    """Build in a process, and wait for that process alone; its peak resident memory in bytes."""
    command = [sys.executable, "-m", "qwen_export", "build", str(folder), "--output", str(output)]
    command += ["--precision", precision, "--no-verify", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return usage.ru_maxrss * 1024


def _unique_parameters(folder: Path) -> int:
    from qwen_export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


if __name__ == "__main__":
    main()
