"""One contender in a process of its own: loads a model, then measures what it is told on stdin.

    python worker.py KIND PATH --threads 2 --capacity 1024 [--settings JSON]

KIND names a module beside this one, `runner_KIND`, whose `Runner` wraps one library. A line of
JSON goes in, a line of JSON comes out: `{"run": {"length": 128, "steps": 64}}` prefills so many
tokens and decodes as many steps, `{"logits": {"length": 128, "path": "x.npy"}}` saves logits,
`{"memory": {}}` reads the memory of this process. The first line out comes unasked: load time,
memory after it, and versions. What the library itself prints goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt

__all__ = ["IntArray", "Runner", "main", "prompt"]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class Runner(Protocol):
    """What every library is wrapped as. Constructing it is what "load" times."""

    versions: dict[str, str]
    """Of the libraries that do the work."""
    vocab_size: int
    """Tokens of the model."""

    def prefill(self, ids: IntArray, room: int) -> FloatArray:
        """Run a prompt in empty caches with room for so many tokens more; its last logits, [V]."""
        ...

    def decode(self, token: int) -> FloatArray:
        """Run one token more; its logits, [V]."""
        ...


def prompt(vocab_size: int, length: int) -> IntArray:
    """The same token ids for every contender."""
    return np.random.default_rng(0).integers(0, vocab_size, length)


def _run(runner: Runner, length: int, steps: int) -> dict[str, float]:
    ids = prompt(runner.vocab_size, length + steps)
    started = time.perf_counter()
    runner.prefill(ids[:length], steps)
    prefilled = time.perf_counter()
    for token in ids[length:].tolist():
        runner.decode(token)
    decoded = time.perf_counter()
    return {"prefill_s": prefilled - started, "step_s": (decoded - prefilled) / max(steps, 1)}


def _logits(runner: Runner, length: int, path: str) -> dict[str, str]:
    """Save the logits after a prompt and after two more tokens, [3, V]."""
    ids = prompt(runner.vocab_size, length + 2)
    rows = [np.array(runner.prefill(ids[:length], 2), np.float32)]
    for token in ids[length:].tolist():
        rows.append(np.array(runner.decode(token), np.float32))
    np.save(path, np.stack(rows))
    return {"path": path}


def _memory() -> dict[str, float]:
    """Anonymous and peak resident memory of this process, in MB."""
    status = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return {
        "anonymous_mb": int(status["RssAnon"].split()[0]) / 1000,
        "peak_mb": int(status["VmHWM"].split()[0]) / 1000,
    }


def _own_stdout() -> TextIO:
    """The standard output for answers alone: libraries that print to it print to stderr."""
    own = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return own


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind")
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--capacity", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    args = parser.parse_args()
    answers = _own_stdout()
    library = importlib.import_module(f"runner_{args.kind}")
    started = time.perf_counter()
    runner = library.Runner(args.path, args.threads, args.capacity, **args.settings)
    seconds = time.perf_counter() - started
    loaded: dict[str, Any] = {"load_s": seconds, "versions": runner.versions, **_memory()}
    print(json.dumps(loaded), file=answers)
    verbs = {"run": _run, "logits": _logits, "memory": lambda _: _memory()}
    for line in sys.stdin:
        [(verb, arguments)] = json.loads(line).items()
        print(json.dumps(verbs[verb](runner, **arguments)), file=answers)


if __name__ == "__main__":
    main()
