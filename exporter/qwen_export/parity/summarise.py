"""From judged positions to a report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_export.parity.case_table import CASES, OFF_BY_ONE
from qwen_export.parity.cases import Invariant
from qwen_export.parity.judge import Judged, TopLogits
from qwen_export.parity.prompts import Prompt
from qwen_export.parity.quality import Quality
from qwen_export.parity.report import (
    CaseResult,
    ControlResult,
    ParityReport,
    PositionResult,
    PromptResult,
    Series,
)
from qwen_export.parity.stored import StoredWeights
from qwen_runtime.backends.base import IntArray
from qwen_runtime.reference_data import ReferenceData, ReferenceRow

__all__ = ["CONTROLS", "WIDE_WINDOW", "Evidence", "summarise"]

MAX_WORST = 10
WIDE_WINDOW = "window too wide"

CONTROLS = {
    "wrong theta": "the original, its rotary base 10 times larger",
    "swapped halves": "the original, the halves of every head paired the other way round",
    OFF_BY_ONE: "the bundle, decoding with a past one token too short",
    WIDE_WINDOW: "the original, its sliding windows too wide",
}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a verification measured."""

    prompts: tuple[Prompt, ...]
    answers: tuple[IntArray, ...]
    """Greedy tokens of each prompt."""
    judged: tuple[Judged, ...]
    tops: tuple[TopLogits, ...]
    """Of each prompt, then of each control."""
    invariants: tuple[Invariant, ...]
    controls: tuple[str, ...]
    """Keys of the controls that a model of this kind has."""
    skipped_controls: Mapping[str, str]
    """Those of them that do not apply, and why."""
    stored: StoredWeights
    """The weights file against the checkpoint."""
    quality: Quality | None = None
    """Of a quantised bundle, or of a run on a device."""
    cases: tuple[str, ...] = tuple(CASES)
    """Keys of those that were to be run."""


def summarise(
    evidence: Evidence,
    *,
    source: str,
    num_layers: int,
    backend: str,
    device: str,
    compute_dtype: str,
    tolerance: float,
    tolerance_reason: str,
    notes: tuple[str, ...],
    duration_s: float,
    versions: dict[str, str],
    hashes: dict[str, str],
) -> ParityReport:
    """Make the report; arguments beside the evidence are its fields of the same name."""
    prompts = evidence.prompts
    order = {key: i for i, key in enumerate(evidence.cases)}
    judged = sorted(
        (item for item in evidence.judged if item.case in order),
        key=lambda item: (order[item.case], item.row),
    )
    positions = [p for item in judged for p in _positions(item, prompts)]
    return ParityReport(
        source=source,
        num_layers=num_layers,
        backend=backend,
        device=device,
        compute_dtype=compute_dtype,
        tolerance=tolerance,
        tolerance_reason=tolerance_reason,
        prompts=tuple(_prompts(evidence, judged)),
        cases=tuple(_case(key, [i for i in judged if i.case == key]) for key in order),
        stored=evidence.stored,
        controls=tuple(_control(key, evidence) for key in evidence.controls),
        invariants=evidence.invariants,
        quality=evidence.quality,
        series=tuple(_series(prompts, judged)),
        departures=tuple(_departures(judged, prompts)),
        worst=tuple(sorted(positions, key=lambda p: -p.error)[:MAX_WORST]),
        notes=notes,
        duration_s=duration_s,
        versions=versions,
        hashes=hashes,
        reference=_reference(evidence),
    )


def _positions(item: Judged, prompts: Sequence[Prompt]) -> Iterator[PositionResult]:
    for index in range(len(item.positions)):
        yield _position(item, index, prompts)


def _position(item: Judged, index: int, prompts: Sequence[Prompt]) -> PositionResult:
    prompt, position = prompts[item.row], int(item.positions[index])
    step = position - len(prompt.tokens) + 1
    return PositionResult(
        case=item.case,
        prompt=prompt.name,
        position=position,
        step=step if step >= 0 else None,
        error=float(item.errors[index]),
        token=int(item.tokens[index]),
        reference_token=int(item.reference_tokens[index]),
        tie=bool(item.ties[index]),
    )


def _departures(judged: Iterable[Judged], prompts: Sequence[Prompt]) -> Iterator[PositionResult]:
    for item in judged:
        failed = np.flatnonzero(item.failed)
        if len(failed):
            earliest = failed[np.argmin(item.positions[failed])]
            yield _position(item, int(earliest), prompts)


def _case(key: str, items: Sequence[Judged]) -> CaseResult:
    return CaseResult(
        key=key,
        graph=CASES[key].graph,
        description=CASES[key].description,
        positions=sum(len(item.positions) for item in items),
        max_error=max((float(item.errors.max()) for item in items), default=0.0),
        mismatches=sum(int((item.tokens != item.reference_tokens).sum()) for item in items),
        ties=sum(int(item.ties.sum()) for item in items),
        failures=sum(int(item.failed.sum()) for item in items),
    )


def _control(key: str, evidence: Evidence) -> ControlResult:
    if key in evidence.skipped_controls:
        return ControlResult(key, CONTROLS[key], None, False, evidence.skipped_controls[key])
    items = [item for item in evidence.judged if item.case == key]
    if not items:
        raise AssertionError(f"{key} was neither run nor left out")
    return ControlResult(
        key,
        CONTROLS[key],
        max(float(item.errors.max()) for item in items),
        any(bool(item.failed.any()) for item in items),
        None,
    )


def _prompts(evidence: Evidence, judged: Sequence[Judged]) -> Iterator[PromptResult]:
    for row, (prompt, answer) in enumerate(zip(evidence.prompts, evidence.answers, strict=True)):
        yield PromptResult(
            prompt.name,
            prompt.kind,
            tuple(prompt.tokens.tolist()),
            prompt.text,
            tuple(answer.tolist()),
            max(float(item.errors.max()) for item in judged if item.row == row),
        )


def _series(prompts: Sequence[Prompt], judged: Sequence[Judged]) -> Iterator[Series]:
    for row, prompt in enumerate(prompts):
        largest: dict[int, float] = {}
        for item in judged:
            if item.row == row:
                for position, error in zip(
                    item.positions.tolist(), item.errors.tolist(), strict=True
                ):
                    largest[position] = max(error, largest.get(position, 0.0))
        ordered = sorted(largest)
        yield Series(
            prompt.name, len(prompt.tokens), tuple(ordered), tuple(largest[p] for p in ordered)
        )


def _reference(evidence: Evidence) -> ReferenceData:
    rows = []
    for prompt, answer, top in zip(
        evidence.prompts, evidence.answers, evidence.tops, strict=False
    ):
        # From the last prompt token on: what prefill returns, then what each step returns.
        kept = top.positions >= len(prompt.tokens) - 1
        rows.append(
            ReferenceRow(
                prompt.name,
                prompt.tokens,
                answer,
                top.tokens[kept],
                top.logits[kept],
                top.scales[kept],
            )
        )
    return ReferenceData(tuple(rows))
