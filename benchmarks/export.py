"""Peak memory and time of an export, and the size of what it writes.

    python benchmarks/export.py Qwen2.5-0.5B --layers 12 24

Every export runs in a process of its own, without verification, from a random checkpoint.
"""

from __future__ import annotations

import argparse
import math
import resource
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
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = {"shape": args.shape}
    with tempfile.TemporaryDirectory() as scratch:
        for layers in sorted(args.layers):  # the peak of all children only grows
            folder, output = (
                Path(scratch, f"checkpoint-{layers}"),
                Path(scratch, f"bundle-{layers}"),
            )
            write_checkpoint(args.shape, folder, seed=0, dtype="bf16", layers=layers)
            command = [sys.executable, "-m", "qwen_export", "build", str(folder)]
            started = time.monotonic()
            subprocess.run(
                [*command, "--output", str(output), "--no-verify", "--json"],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            seconds = time.monotonic() - started
            # The largest child so far; layers grow from run to run.
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
            unique = _unique_parameters(folder)
            size = (output / "weights.bin").stat().st_size
            result |= {
                f"{layers} layers: peak RSS (MB)": peak,
                f"{layers} layers: seconds": seconds,
                f"{layers} layers: weights.bin (MB)": size / 1e6,
                f"{layers} layers: weights.bin / unique parameters": size / (4 * unique),
            }
    report(result, args.as_json)


def _unique_parameters(folder: Path) -> int:
    from qwen_export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


if __name__ == "__main__":
    main()
