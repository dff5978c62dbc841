"""What `qwen-export plan` says against what a build and a run then show.

    python benchmarks/plan.py Qwen2.5-0.5B --layers 4 --precision fp32 int8 int4 --context 1024

Every build and every run has a process of its own. The checkpoint is random. A run generates with
`LLM` until as many prompts are kept as it keeps by default; the run before it, which is not
counted, leaves the packed weights in a cache folder of the benchmark's own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from common import memory, report
from random_checkpoint import SHAPES, write_checkpoint

DECODE_STEPS = 16
KILO = 1024 / 1000
"""`memory` divides kibibytes by 1000."""


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(run(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES), nargs="?", default="Qwen2.5-0.5B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--verify", action="store_true", help="verify the bundle, with its peak")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    result: dict[str, object] = {"shape": args.shape, "layers": args.layers}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["QWEN_EXPORT_CACHE"] = str(Path(scratch, "cache"))
        checkpoint = Path(scratch, "checkpoint")
        write_checkpoint(args.shape, checkpoint, seed=0, dtype="bf16", layers=args.layers)
        for precision in args.precision:
            planned = plan(checkpoint, precision, args.context, args.batch)
            bundle = Path(scratch, precision)
            measured = build(checkpoint, bundle, precision, verify=args.verify)
            command = [sys.executable, __file__, "--run", str(bundle)]
            command += [str(args.context), str(args.batch)]
            _, second = (subprocess.check_output(command) for _ in range(2))
            measured |= json.loads(second)
            cached = Path(scratch, "cache").rglob("*")
            measured["packed cache (MB)"] = _num_bytes(cached) / 1e6
            shutil.rmtree(Path(scratch, "cache"), ignore_errors=True)
            for name, value in measured.items():
                ratio = f", ratio {planned[name] / value:.3f}" if value else ""
                result[f"{precision}: {name}"] = (
                    f"planned {planned[name]:,.1f}, measured {value:,.1f}{ratio}"
                )
    report(result, args.as_json)


def plan(checkpoint: Path, precision: str, context: int, batch: int) -> dict[str, float]:
    """The plan's figures, by the names that `build` and `run` give to what they measure."""
    command = [sys.executable, "-m", "qwen_export", "plan", str(checkpoint), "--json"]
    command += ["--precision", precision, "--context", str(context), "--batch", str(batch)]
    command += ["--compute-dtype", "fp32"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    (entry,) = json.loads(done.stdout)["precisions"]
    (use,), (speed,) = entry["memory"], entry["speed"]
    return {
        "weights.bin (MB)": entry["disk"]["weights"] / 1e6,
        "bundle (MB)": entry["disk"]["total"] / 1e6,
        "peak of the build (MB)": entry["build_peak"] / 1e6,
        "peak of the verified build (MB)": entry["verified_build_peak"] / 1e6,
        "packed cache (MB)": entry["packed_cache"] / 1e6,
        "KV caches with kept prompts (MB)": (use["kv_cache"] + use["kept_prompts"]) / 1e6,
        "resident with prompts kept (MB)": use["total"] / 1e6,
        "decode (tok/s)": speed["expected"] * batch,
    }


def build(checkpoint: Path, bundle: Path, precision: str, *, verify: bool) -> dict[str, float]:
    """Build in a process, and wait for that process alone: its peak is not another's."""
    command = [sys.executable, "-m", "qwen_export", "build", str(checkpoint)]
    command += ["--output", str(bundle), "--precision", precision, "--json"]
    process = subprocess.Popen(
        [*command, *([] if verify else ["--no-verify"])],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    name = "peak of the verified build (MB)" if verify else "peak of the build (MB)"
    return {
        "weights.bin (MB)": (bundle / "weights.bin").stat().st_size / 1e6,
        "bundle (MB)": _num_bytes(bundle.rglob("*")) / 1e6,
        name: _peak_bytes(usage) / 1e6,
    }


def run(path: Path, context: int, batch: int) -> dict[str, float]:
    """Generate at a length; memory of this process with prompts kept, and decode speed."""
    import numpy as np

    from qwen_runtime import LLM
    from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
    from qwen_runtime.bundle import Bundle
    from qwen_runtime.engine.prefix import KEPT_SLOTS

    bundle = Bundle.open(path)
    rng = np.random.default_rng(0)

    def prompts(length: int) -> list[list[int]]:
        size = (batch, length)
        return [
            list(map(int, row)) for row in rng.integers(0, bundle.manifest.model.vocab_size, size)
        ]

    with LLM(bundle) as llm:
        for _ in range(-(-KEPT_SLOTS // batch)):
            llm.generate(
                prompts(context - DECODE_STEPS),
                do_sample=False,
                max_new_tokens=DECODE_STEPS,
                min_new_tokens=DECODE_STEPS,
            )
        resident = memory()["resident"] * KILO
    runner = OnnxRuntimeRunner(bundle)
    slots = list(range(batch))
    runner.allocate(max(batch, KEPT_SLOTS), context)
    cache_bytes = runner.cache_bytes
    for slot, tokens in zip(slots, prompts(context - DECODE_STEPS - 1), strict=True):
        runner.prefill([slot], [np.array(tokens)], [0], [1])
    runner.decode(slots, [0] * batch)
    steps = []
    for _ in range(DECODE_STEPS):
        started = time.perf_counter()
        runner.decode(slots, [0] * batch)
        steps.append(time.perf_counter() - started)
    return {
        "KV caches with kept prompts (MB)": cache_bytes / 1e6,
        "resident with prompts kept (MB)": resident,
        "decode (tok/s)": batch / sorted(steps)[len(steps) // 2],
    }


def _num_bytes(paths: Iterable[Path]) -> int:
    """Of the files among them."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def _peak_bytes(usage: resource.struct_rusage) -> int:
    """The peak that Linux gives in kibibytes."""
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
