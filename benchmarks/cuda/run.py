"""Decode, prefill and memory on an NVIDIA GPU, beside transformers and onnxruntime-genai.

    python benchmarks/cuda/run.py --models Qwen2.5-1.5B Qwen2.5-7B --json cuda.json
    python benchmarks/cuda/run.py --dry-run

Random weights in the published shapes; contenders run one after the other in this process, each
after the one before has given its memory back. One that is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from contenders import CONTENDERS, available, device_facts
from random_checkpoint import SHAPES, write_checkpoint
from workload import GOALS, MODELS, Measured, Work, works

__all__ = ["main"]

_PACKAGES = (
    *("qwen-export", "onnxruntime", "onnxruntime-gpu", "cuda-bindings", "torch", "transformers"),
    "onnxruntime-genai-cuda",
)
_QUANTISED = ("ours", "onnxruntime-genai")


def main(arguments: list[str] | None = None) -> int:
    """Measure everything and print the table; exit status 1 where a goal was missed."""
    options = _parser().parse_args(arguments)
    plan = works(tuple(options.models), options.compute_dtype)
    missing = available()
    chosen = [name for name in options.contenders if options.dry_run or missing[name] is None]
    if options.dry_run:
        _print_plan(plan, chosen, missing)
        return 0
    facts = device_facts() | _versions()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="qwen-cuda-") as made:
        folder = options.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for work in plan:
            checkpoint = folder / work.model
            if not checkpoint.exists():
                write_checkpoint(work.model, checkpoint)
            for name in chosen:
                if work.precision == "int4" and name not in _QUANTISED:
                    continue
                print(f"{work.name}: {name}", file=sys.stderr, flush=True)
                rows.append(_row(work, name, CONTENDERS[name](work, checkpoint, folder)))
    result = {
        "command": " ".join(["python", *sys.argv]),
        **facts,
        "left_out": {name: why for name, why in missing.items() if why is not None},
        "rows": rows,
        "goals": _goals(rows),
    }
    _print_table(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return 0 if all(goal["reached"] for goal in result["goals"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=list(MODELS))
    parser.add_argument(
        "--compute-dtype", choices=("fp16", "bf16"), default="fp16", help="default: fp16"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS)
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where checkpoints and bundles are made and kept; a temporary folder otherwise",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    return parser


def _print_plan(plan: tuple[Work, ...], chosen: list[str], missing: dict[str, str | None]) -> None:
    for work in plan:
        names = [name for name in chosen if work.precision != "int4" or name in _QUANTISED]
        print(
            f"{work.name}: {work.steps} steps after {work.past} tokens"
            + (f", a prompt of {work.prompt}" if work.batch == 1 else "")
            + f", computed in {work.compute_dtype}; {', '.join(names)}"
        )
    for name in chosen:
        print(f"{name}: {missing[name] or 'installed'}")
    for goal in GOALS:
        bound = f"{'at most' if goal.at_most else 'at least'} {goal.bound:,g}"
        print(f"goal: {goal.model} {goal.precision}, batch {goal.batch}: {goal.figure} {bound}")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _row(work: Work, contender: str, measured: Measured) -> dict[str, Any]:
    return {"contender": contender, **asdict(work), **asdict(measured)}


def _goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ours reached of the goals that were measured, the relative ones included."""
    found: list[dict[str, Any]] = []
    ours = [row for row in rows if row["contender"] == "ours"]
    for goal in GOALS:
        key = (goal.model, goal.precision, goal.batch)
        for row in ours:
            if (row["model"], row["precision"], row["batch"]) == key:
                value = row[goal.figure]
                reached = value <= goal.bound if goal.at_most else value >= goal.bound
                found.append({**asdict(goal), "value": value, "reached": reached})
    for row in ours:
        name = f"{row['model']} {row['precision']}, batch {row['batch']}"
        if row["generate_step_ms"] is not None:
            ratio = row["generate_step_ms"] / row["step_ms"]
            found.append(_relative(f"{name}: generate / raw step", ratio, 1.1))
        room = 1.03 * row["weights_and_caches_mb"] + 1000
        found.append(_relative(f"{name}: device memory / allowed", row["device_mb"] / room, 1.0))
        peer = next(
            (
                each
                for each in rows
                if each["contender"] == "onnxruntime-genai"
                and row["precision"] == "int4"
                and (each["model"], each["precision"], each["batch"])
                == (row["model"], row["precision"], row["batch"])
            ),
            None,
        )
        if peer is not None:
            ratio = row["step_ms"] / peer["step_ms"]
            found.append(_relative(f"{name}: step / onnxruntime-genai's", ratio, 1 / 1.1))
    return found


def _relative(figure: str, value: float, bound: float) -> dict[str, Any]:
    return {"figure": figure, "bound": bound, "value": value, "reached": value <= bound}


def _print_table(result: dict[str, Any]) -> None:
    print(f"{result['gpu']}, driver {result['driver']}, {result['gpu_memory']}")
    print(
        "| model | contender | ms/step | generate ms/step | sampled ms/step | prefill tok/s "
        "| device MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        name = f"{row['model']} {row['precision']}, batch {row['batch']}"
        cells = [
            f"{row['step_ms']:.2f}",
            _cell(row["generate_step_ms"], ".2f"),
            _cell(row["sampled_step_ms"], ".2f"),
            _cell(row["prefill_tokens_per_s"], ",.0f"),
            f"{row['device_mb']:,.0f}",
        ]
        print(f"| {name} | {row['contender']} | {' | '.join(cells)} |")
    for name, why in result["left_out"].items():
        print(f"left out: {name}, {why}")
    for goal in result["goals"]:
        name = goal["figure"]
        if "model" in goal:
            name = f"{goal['model']} {goal['precision']}, batch {goal['batch']}: {name}"
        verdict = "reached" if goal["reached"] else "missed"
        print(f"{verdict}: {name} {goal['value']:,.3g} (bound {goal['bound']:,.3g})")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
