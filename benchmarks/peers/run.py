"""Ours against llama.cpp, onnxruntime-genai and transformers on the CPU, measured in turn.

    benchmarks/peers/setup && python benchmarks/peers/run.py --work /tmp/peers-work

A random checkpoint in the shape of Qwen2.5-0.5B becomes a model for every contender. Each runs in
a process of its own. Contenders that are compared form a group and run in turn, A B C, C B A, so
that drift of the machine cancels; a ratio is the median over the rounds. Every contender gets the
same token ids and gives the logits of the last token as a NumPy array, at every step. Where a peer
has settings to choose from, all are tried first and the fastest is kept. Models and chosen
settings stay in the work folder. The machine must be idle: a thread that shares its core slows
down those most that wait for each other in a loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(1, str(HERE.parent))

from artefacts import SHAPE, ArtefactError, Workshop  # noqa: E402 - needs the path above
from common import environment  # noqa: E402 - needs the path above
from contenders import GROUPS, REFERENCE  # noqa: E402 - stays with its neighbours
from measure import Benchmark, Plan  # noqa: E402 - needs the path above
from process import ProcessError  # noqa: E402 - stays with its neighbours
from report import Samples, markdown, verdicts  # noqa: E402 - stays with its neighbours

_BUSY = 0.5
"""Load average from which on something else competes for the cores."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the models")
    parser.add_argument("--peers-python", type=Path, default=HERE / ".venv" / "bin" / "python")
    parser.add_argument("--layers", type=int, help="of the model; as published by default")
    parser.add_argument("--rounds", type=int, default=4, help="pairs measured; default 4")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 900], help="of prompts")
    parser.add_argument("--steps", type=int, default=48, help="tokens decoded; default 48")
    parser.add_argument("--threads", type=int, default=2, help="of every contender; default 2")
    parser.add_argument("--only", nargs="+", choices=[*GROUPS], default=[*GROUPS], help="groups")
    parser.add_argument("--rebuild", nargs="+", default=[], metavar="MODEL", help="made anew")
    parser.add_argument("--tune", action="store_true", help="choose the peers' settings anew")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.threads, *args.lengths) < 1:
        parser.error("--rounds, --steps, --threads and --lengths must be at least 1")
    if not args.peers_python.exists():
        parser.error(f"{args.peers_python} is missing: run benchmarks/peers/setup")
    folder = (args.work / f"layers-{args.layers or 'all'}").resolve()
    # Packed weights lie beside the models, not among those that the user runs.
    os.environ["QWEN_EXPORT_CACHE"] = str(folder / "cache")
    peers_python = args.peers_python.absolute()  # not resolved: a link is what makes it virtual
    workshop = Workshop(folder, peers_python, args.layers)
    if unknown := set(args.rebuild) - {*workshop.names}:
        parser.error(f"--rebuild takes {', '.join(workshop.names)}, got {', '.join(unknown)}")
    for name in args.rebuild:
        workshop.remove(name)
    settings_file = folder / "settings.json"
    if args.tune:
        settings_file.unlink(missing_ok=True)
    plan = Plan(tuple(args.lengths), args.steps, args.rounds, args.threads)
    benchmark = Benchmark(workshop, plan, peers_python, settings_file)
    before = os.getloadavg()[0]
    if _busy(before):
        print(f"The machine is busy (load {before:.1f}): figures will mislead", file=sys.stderr)
    measured: dict[str, Samples] = {}
    try:
        with benchmark.start(REFERENCE) as process:
            reference = benchmark.logits(process)
        for group in args.only:
            measured |= benchmark.measure(GROUPS[group], reference)
    except (ArtefactError, ProcessError) as error:
        sys.exit(f"Error: {error}")
    _print(measured, args, before)
    for name, reason in benchmark.failed.items():
        print(f"Not measured: {name}: {reason}", file=sys.stderr)
    sys.exit(bool(benchmark.failed))


def _print(measured: dict[str, Samples], args: argparse.Namespace, load_before: float) -> None:
    circumstances = {
        "command": " ".join(["python", *sys.argv]),
        "shape": SHAPE,
        "layers": args.layers or "all",
        "threads": args.threads,
        "steps": args.steps,
        "rounds": args.rounds,
        "load average before": f"{load_before:.2f}" + (" (busy: misleading)" * _busy(load_before)),
        **environment(),
    }
    if args.as_json:
        contenders = {name: dataclasses.asdict(samples) for name, samples in measured.items()}
        claims = verdicts(measured, args.lengths)
        print(json.dumps({**circumstances, "contenders": contenders, "claims": claims}, indent=2))
        return
    print("\n".join(f"{name}: {value}" for name, value in circumstances.items()), end="\n\n")
    print(markdown(measured, args.lengths))


def _busy(load_average: float) -> bool:
    return load_average > _BUSY


if __name__ == "__main__":
    main()
