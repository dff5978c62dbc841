"""`check`: does a bundle still answer like its original, on this machine?

No PyTorch is needed: the original's tokens and best logits came with the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_runtime.backends.base import FloatArray, ModelRunner
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.comparison import TOLERANCES, Comparison, compare
from qwen_runtime.errors import BundleError
from qwen_runtime.reference_data import ReferenceData, ReferenceRow

__all__ = ["CPU_BACKENDS", "CheckDeparture", "CheckResult", "OpenRunner", "ReplayResult", "check"]

OpenRunner = Callable[[Bundle], ModelRunner]
"""Opens a bundle on an engine."""

Progress = Callable[[str, int, int], None]
"""Called with the step's name, the amount done and the total (bytes, or model calls)."""

CPU_BACKENDS: dict[str, OpenRunner] = {
    "ONNX Runtime": OnnxRuntimeRunner,
    "ONNX Runtime with the decode graph": lambda bundle: OnnxRuntimeRunner(
        bundle, decode_graph=True
    ),
}
"""By name: the arrangement that serves requests, and the one that also runs decode.onnx."""


@dataclass(frozen=True, slots=True)
class CheckDeparture:
    """A position at which a bundle does not answer like its original."""

    backend: str
    prompt: str
    step: int
    """Greedy tokens before it; 0 is the end of the prompt."""
    error: float
    token: int
    """Our greedy token."""
    reference_token: int
    """The original's greedy token."""

    def __str__(self) -> str:
        return (
            f"{self.backend}, prompt {self.prompt!r}, greedy step {self.step}: logit error "
            f"{self.error:.2g}; ours chooses token {self.token}, the original "
            f"{self.reference_token}"
        )


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """All prompts on one engine."""

    backend: str
    positions: int
    """Positions compared."""
    max_error: float
    """Largest max|difference| / max|reference|, over the original's best tokens."""
    ties: int
    """Tokens that differ where rounding decides."""
    first_departure: CheckDeparture | None
    """The earliest failed step of the first prompt with one; None if all is well."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of `check`."""

    num_files: int
    """Core files whose sha256 was right; others raise."""
    tolerance: float
    prompts: int
    replays: tuple[ReplayResult, ...]

    @property
    def passed(self) -> bool:
        """Whether the bundle answers like its original on every engine."""
        return all(replay.first_departure is None for replay in self.replays)

    @property
    def max_error(self) -> float:
        """The largest logit error."""
        return max(replay.max_error for replay in self.replays)

    @property
    def first_departure(self) -> CheckDeparture | None:
        """Where it first departs; None if it passed."""
        found = (replay.first_departure for replay in self.replays)
        return next((departure for departure in found if departure is not None), None)


def check(
    bundle: Bundle,
    *,
    backends: Mapping[str, OpenRunner] | None = None,
    progress: Progress = lambda *_: None,
) -> CheckResult:
    """Prove a bundle again: every file's hash, then every prompt it was verified with.

    Args:
        bundle: The bundle; it is not written to.
        backends: Engines to run it on, by name; None is `CPU_BACKENDS`.
        progress: Called as the work goes on.

    Returns:
        What was found; whether the bundle passed is in it.

    Raises:
        BundleError: If a file was changed, the bundle was not verified when it was built, or it
            is in a format whose tolerance was never argued.
        BackendError: If an engine is missing or cannot run the bundle.
        ValueError: If ``backends`` is empty.
    """
    backends = CPU_BACKENDS if backends is None else backends
    if not backends:
        raise ValueError("backends must name at least one engine, got none; leave it out for CPU")
    manifest = bundle.manifest
    if manifest.compute_dtype not in TOLERANCES:
        raise BundleError(
            f"{bundle.path}: compute_dtype must be one of {', '.join(TOLERANCES)} to be checked, "
            f"got {manifest.compute_dtype}",
            path=bundle.path,
        )
    tolerance = TOLERANCES[manifest.compute_dtype].at_depth(manifest.model.num_hidden_layers)
    # Before minutes of hashing: a bundle that was not verified has nothing to compare with.
    data = ReferenceData.read(bundle)
    _check_hashes(bundle, progress)
    replays = []
    for name, open_runner in backends.items():
        runner = open_runner(bundle)
        try:
            replays.append(_replay(name, runner, data, tolerance, progress))
        finally:
            runner.close()
    return CheckResult(len(manifest.files), tolerance, len(data.rows), tuple(replays))


def _check_hashes(bundle: Bundle, progress: Progress) -> None:
    total = sum(entry.num_bytes for entry in bundle.manifest.files.values())
    done = 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("Checking files", done, total)

    bundle.check_hashes(advance)


def _replay(
    name: str, runner: ModelRunner, data: ReferenceData, tolerance: float, progress: Progress
) -> ReplayResult:
    rows = data.rows
    found: list[list[Comparison]] = [[] for _ in rows]

    def judge(active: Sequence[int], step: int, logits: FloatArray) -> None:
        for row, values in zip(active, logits, strict=True):
            found[row].append(_compare(rows[row], step, values, tolerance))

    num_calls = 1 + max(len(row.steps) for row in rows)
    runner.allocate(len(rows), 1)
    prompts = [row.prompt for row in rows]
    first = runner.prefill(range(len(rows)), prompts, [0] * len(rows), [1] * len(rows))
    judge(range(len(rows)), 0, np.concatenate(first))
    progress(f"Replaying on {name}", 1, num_calls)
    for step in range(num_calls - 1):
        active = [i for i, row in enumerate(rows) if step < len(row.steps)]
        logits = runner.decode(active, [int(rows[i].steps[step]) for i in active])
        judge(active, step + 1, logits)
        progress(f"Replaying on {name}", step + 2, num_calls)
    steps = [item for row in found for item in row]
    return ReplayResult(
        backend=name,
        positions=len(steps),
        max_error=max(float(item.errors[0]) for item in steps),
        ties=sum(int(item.ties[0]) for item in steps),
        first_departure=_first_departure(name, rows, found),
    )


def _compare(row: ReferenceRow, step: int, logits: FloatArray, tolerance: float) -> Comparison:
    """One position, over the tokens whose logits the bundle keeps."""
    one = slice(step, step + 1)
    return compare(
        logits[row.top_tokens[one]],
        row.top_logits[one],
        tolerance=tolerance,
        tokens=np.array([np.argmax(logits)], np.int64),
        reference_tokens=row.top_tokens[one, 0],
        scales=row.scales[one],
    )


def _first_departure(
    backend: str, rows: Sequence[ReferenceRow], found: Sequence[Sequence[Comparison]]
) -> CheckDeparture | None:
    for row, steps in zip(rows, found, strict=True):
        for step, item in enumerate(steps):
            if item.failed[0]:
                return CheckDeparture(
                    backend,
                    row.name,
                    step,
                    float(item.errors[0]),
                    int(item.tokens[0]),
                    int(item.reference_tokens[0]),
                )
    return None
