"""`check`: does a bundle still answer like its original, on this machine?

No PyTorch is needed: the original's tokens and best logits came with the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from qwen_runtime.backends.base import FloatArray, ModelRunner
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.backends.packed_cache import PackedCache
from qwen_runtime.backends.sessions import MIN_CACHED_BYTES
from qwen_runtime.bundle import Bundle
from qwen_runtime.comparison import TOLERANCES, Comparison, compare
from qwen_runtime.errors import BundleError
from qwen_runtime.lowered_file import LoweredFolder, lowered_names
from qwen_runtime.reference_data import ReferenceData, ReferenceRow

__all__ = [
    "CPU_BACKENDS",
    "LOWERED_BACKEND",
    "MAX_SERVED_ERROR",
    "SERVED_BACKEND",
    "CheckDeparture",
    "CheckResult",
    "OpenRunner",
    "ReplayResult",
    "check",
    "replay",
]

OpenRunner = Callable[[Bundle], ModelRunner]
"""Opens a bundle on an engine."""

Progress = Callable[[str, int, int], None]
"""Called with the step's name, the amount done and the total (bytes, or model calls)."""

CPU_BACKENDS: dict[str, OpenRunner] = {
    "ONNX Runtime": lambda bundle: OnnxRuntimeRunner(
        bundle, exact=_quantized(bundle), lowered=False
    ),
    "ONNX Runtime with the decode graph": lambda bundle: OnnxRuntimeRunner(
        bundle, decode_graph=True, exact=_quantized(bundle)
    ),
}
"""By name: the portable prefill graph, which serves requests for float weights, and the runner that
has decode.onnx beside it. Quantised weights meet fp32 activations in them, so that they are held to
the tolerance of fp32."""

LOWERED_BACKEND = "ONNX Runtime with the graph for the CPU"
"""The graph in ``lowered/cpu``, where a bundle has one, with fp32 activations."""
_CPU = "cpu"

SERVED_BACKEND = "ONNX Runtime as served"
SERVED_MARGIN = 2.0
"""How many times the largest error found at the build int8 activations may cost here. Processors
round and sum alike but for the last bits, and small differences upstream move a value to the next
step of its block now and then; a wrong kernel is off by the logits themselves."""
MAX_SERVED_ERROR = 0.25
"""Largest mean error of a position that int8 activations may cause, at the build and here: 1 is
nothing in common. The margin goes no further than this beyond what the build measured."""


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
    mean_error: float
    """Mean of it over the positions."""
    tolerance: float
    """Largest error that a position may have."""
    ties: int
    """Tokens that differ where rounding decides."""
    first_departure: CheckDeparture | None
    """The earliest failed step of the first prompt with one; None if all is well."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of `check`."""

    num_files: int
    """Files whose sha256 was right, those of a graph for the CPU included; others raise."""
    tolerance: float
    prompts: int
    replays: tuple[ReplayResult, ...]
    served: ReplayResult | None = None
    """A quantised bundle with int8 activations, as it serves requests; None for others. Its errors
    have bounds of their own, made from what the build measured."""
    served_mean_tolerance: float | None = None
    """Largest mean error of ``served``."""
    packed_weights: str | None = None
    """Folder of the packed weights that ``served`` may have read; None where it keeps none."""

    @property
    def passed(self) -> bool:
        """Whether the bundle answers like its original on every engine."""
        return self.problem is None

    @property
    def problem(self) -> str | None:
        """What is wrong, in words; None if it passed."""
        departure, served, allowed = self.first_departure, self.served, self.served_mean_tolerance
        if departure is not None and (served is None or departure != served.first_departure):
            return str(departure)
        if departure is not None:
            return f"{departure}{self._where_to_look}"
        if served is None or allowed is None or served.mean_error <= allowed:
            return None
        return (
            f"{served.backend}: mean logit error {served.mean_error:.2g} is above the "
            f"{allowed:.2g} that the build's measurement allows{self._where_to_look}"
        )

    @property
    def _where_to_look(self) -> str:
        """What to do where only the way of serving departs: the bundle's own files are sound."""
        if self.packed_weights is None:
            return ""
        return (
            f"; packed weights may be damaged: delete {self.packed_weights}, which is made again, "
            "and check once more"
        )

    @property
    def max_error(self) -> float:
        """The largest logit error of ``replays``."""
        return max(replay.max_error for replay in self.replays)

    @property
    def first_departure(self) -> CheckDeparture | None:
        """The first position that departs; None if none does."""
        replays = (*self.replays, self.served) if self.served else self.replays
        found = (replay.first_departure for replay in replays)
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
        backends: Engines to run it on, by name; None is `CPU_BACKENDS`, and for a quantised bundle
            also its graph for the CPU and the way it serves requests.
        progress: Called as the work goes on.

    Returns:
        What was found; whether the bundle passed is in it.

    Raises:
        BundleError: If a file was changed, the bundle was not verified when it was built, it is in
            a format whose tolerance was never argued, or its graph for the CPU is damaged or was
            made for other weights.
        BackendError: If an engine is missing or cannot run the bundle.
        ValueError: If ``backends`` is empty.
    """
    on_cpu = backends is None
    lowered = LoweredFolder.open(bundle, _CPU) if _CPU in lowered_names(bundle.path) else None
    if backends is None:
        own = {} if lowered is None else {LOWERED_BACKEND: _open_lowered}
        backends = CPU_BACKENDS | own
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
    _check_hashes(bundle, lowered, progress)
    replays = tuple(
        _replay(name, open_runner, bundle, data, tolerance, progress)
        for name, open_runner in backends.items()
    )
    served = mean_bound = packed = None
    quality = manifest.parity.quality
    if on_cpu and quality is not None:
        bound = _served_bound(quality.served_error, tolerance)
        served = _replay(SERVED_BACKEND, OnnxRuntimeRunner, bundle, data, bound, progress)
        mean_bound = _served_bound(quality.mean_served_error, tolerance)
        if manifest.files[manifest.weights.file].num_bytes >= MIN_CACHED_BYTES:
            cache = PackedCache.of_user()
            packed = None if cache is None else str(cache.root)
    return CheckResult(
        len(manifest.files) + (len(lowered.description.files) if lowered is not None else 0),
        tolerance,
        len(data.rows),
        replays,
        served,
        mean_bound,
        packed,
    )


def _served_bound(measured: float, tolerance: float) -> float:
    """What int8 activations may cost here, by what they cost at the build."""
    return max(tolerance, measured, min(SERVED_MARGIN * measured, MAX_SERVED_ERROR))


def _quantized(bundle: Bundle) -> bool:
    return bundle.manifest.quantization is not None


def _open_lowered(bundle: Bundle) -> ModelRunner:
    return OnnxRuntimeRunner(bundle, exact=_quantized(bundle))


def _check_hashes(bundle: Bundle, lowered: LoweredFolder | None, progress: Progress) -> None:
    entries = [*bundle.manifest.files.values()]
    if lowered is not None:
        entries += lowered.description.files.values()
    total, done = sum(entry.num_bytes for entry in entries), 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("Checking files", done, total)

    bundle.check_hashes(advance)
    if lowered is not None:
        lowered.check_hashes(advance)


def _replay(
    name: str,
    open_runner: OpenRunner,
    bundle: Bundle,
    data: ReferenceData,
    tolerance: float,
    progress: Progress,
) -> ReplayResult:
    with closing(open_runner(bundle)) as runner:
        return replay(name, runner, data, tolerance, progress)


def replay(
    name: str,
    runner: ModelRunner,
    data: ReferenceData,
    tolerance: float,
    progress: Progress = lambda *_: None,
) -> ReplayResult:
    """Run every prompt of a reference, and its greedy tokens one by one, and compare.

    Args:
        name: What the runner is called in the result.
        runner: Its slots are taken from 0 on, and hold tokens afterwards.
        data: What the original answered.
        tolerance: Largest logit error of a position.
        progress: Called as the work goes on.

    Returns:
        What was found; a departure is in it and does not raise.
    """
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
        mean_error=float(np.mean([item.errors[0] for item in steps])),
        tolerance=tolerance,
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
