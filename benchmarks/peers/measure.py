"""Starts contenders, chooses the peers' settings and measures groups of them in turn."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from artefacts import ArtefactError, Workshop
from contenders import Contender
from process import Process, ProcessError
from report import Samples

__all__ = ["Benchmark", "Plan", "lowest_correlation"]

_TUNING_LENGTH, _TUNING_STEPS, _TUNING_ROUNDS = 512, 16, 2
_CHECK_LENGTH = 128
_WORKER = Path(__file__).with_name("worker.py")

Logits = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    lengths: tuple[int, ...]
    """Of prompts, in tokens."""
    steps: int
    """Tokens decoded after each."""
    rounds: int
    """How often everything is measured."""
    threads: int
    """Of every contender."""

    @property
    def capacity(self) -> int:
        """Tokens of the longest row."""
        longest = max(*self.lengths, _TUNING_LENGTH, _CHECK_LENGTH)
        return longest + max(self.steps, _TUNING_STEPS)


class Benchmark:
    """Measures contenders.

    Args:
        workshop: Makes the models.
        plan: What to measure.
        peers_python: Interpreter of the peers' environment.
        settings_file: Keeps the chosen settings between runs.
    """

    def __init__(
        self, workshop: Workshop, plan: Plan, peers_python: Path, settings_file: Path
    ) -> None:
        self._workshop = workshop
        self._plan = plan
        self._peers_python = peers_python
        self._settings_file = settings_file
        self._settings: dict[str, dict[str, Any]] = {}
        if settings_file.exists():
            self._settings = json.loads(settings_file.read_text())
        self.failed: dict[str, str] = {}
        """Why contenders were left out, by name."""

    def start(self, contender: Contender, settings: dict[str, Any] | None = None) -> Process:
        """A contender in a process of its own, loaded; its model is made where it is missing.

        Raises:
            ArtefactError: If the model could not be made.
            ProcessError: If it could not be loaded.
        """
        path = self._workshop.get(contender.model)
        chosen = self.settings(contender) if settings is None else settings
        python = str(self._peers_python) if contender.is_peer else sys.executable
        command = [python, str(_WORKER), contender.kind, str(path)]
        command += ["--threads", str(self._plan.threads), "--capacity", str(self._plan.capacity)]
        return Process([*command, "--settings", json.dumps(chosen)], contender.name)

    def settings(self, contender: Contender) -> dict[str, Any]:
        """The fastest of a contender's settings, by the product of prefill and decode time."""
        if len(contender.variants) == 1:
            return contender.variants[0]
        if contender.name not in self._settings:
            print(f"Choosing settings of {contender.name} ...", file=sys.stderr)
            scores = self._tuning_scores(contender)
            fastest = contender.variants[scores.index(min(scores))]
            self._settings[contender.name] = fastest
            self._settings_file.write_text(json.dumps(self._settings, indent=2) + "\n")
        return self._settings[contender.name]

    def logits(self, process: Process) -> Logits:
        """After a prompt and after two more tokens, [3, V]."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, "logits.npy")
            process.ask("logits", length=_CHECK_LENGTH, path=str(path))
            values: Logits = np.load(path)
        return values

    def measure(self, group: Sequence[Contender], reference: Logits) -> dict[str, Samples]:
        """Measure contenders in turn; those that do not run are left out and named in `failed`.

        Args:
            group: Contenders; neighbours are measured right after each other.
            reference: Logits of the unquantised model, [3, V].

        Returns:
            Samples by name.
        """
        with ExitStack() as stack:
            running: dict[Contender, Process] = {}
            measured: dict[str, Samples] = {}
            for contender in group:
                try:
                    running[contender] = stack.enter_context(self.start(contender))
                except (ArtefactError, ProcessError) as error:
                    self.failed[contender.name] = str(error)
            for contender, process in running.items():
                samples = measured[contender.name] = self._describe(contender)
                samples.versions = process.loaded["versions"]
                samples.correlation = lowest_correlation(reference, self.logits(process))
                process.ask("run", length=max(self._plan.lengths), steps=2)  # warms up
            for round_number in range(self._plan.rounds):
                print(f"Round {round_number + 1} of {self._plan.rounds} ...", file=sys.stderr)
                order = [*running] if round_number % 2 == 0 else [*running][::-1]
                self._round({contender: running[contender] for contender in order}, measured)
            for contender, process in running.items():
                memory = process.ask("memory")
                measured[contender.name].anonymous_mb = memory["anonymous_mb"]
                measured[contender.name].peak_mb = memory["peak_mb"]
        return measured

    def _round(self, running: dict[Contender, Process], measured: dict[str, Samples]) -> None:
        for length in self._plan.lengths:
            for contender, process in running.items():
                run = process.ask("run", length=length, steps=self._plan.steps)
                samples = measured[contender.name]
                samples.prefill_s.setdefault(length, []).append(run["prefill_s"])
                samples.step_s.setdefault(length, []).append(run["step_s"])
        for contender in running:
            with self.start(contender) as fresh:
                measured[contender.name].load_s.append(fresh.loaded["load_s"])

    def _tuning_scores(self, contender: Contender) -> list[float]:
        """Of every variant: logarithms of the fastest times added up, less is faster."""
        prefill: list[list[float]] = [[] for _ in contender.variants]
        step: list[list[float]] = [[] for _ in contender.variants]
        with ExitStack() as stack:
            running = [
                stack.enter_context(self.start(contender, variant))
                for variant in contender.variants
            ]
            for round_number in range(_TUNING_ROUNDS + 1):
                for number, process in enumerate(running):
                    run = process.ask("run", length=_TUNING_LENGTH, steps=_TUNING_STEPS)
                    if round_number:  # the first round warms up
                        prefill[number].append(run["prefill_s"])
                        step[number].append(run["step_s"])
        return [math.log(min(p)) + math.log(min(s)) for p, s in zip(prefill, step, strict=True)]

    def _describe(self, contender: Contender) -> Samples:
        options = [f"{key}={value}" for key, value in self.settings(contender).items()]
        made = self._workshop.describe(contender.model)
        return Samples(
            ", ".join([*([made] if made else []), *options]) or "defaults",
            model_mb=self._workshop.megabytes(contender.model),
        )


def lowest_correlation(reference: Logits, logits: Logits) -> float:
    """Over the rows, each [V]."""
    return min(float(np.corrcoef(a, b)[0, 1]) for a, b in zip(reference, logits, strict=True))
