"""What a verification found, as data."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_export.parity.cases import Invariant
from qwen_export.parity.quality import Quality, finite
from qwen_export.parity.stored import StoredWeights
from qwen_runtime.manifest import ParitySummary
from qwen_runtime.reference_data import REFERENCE_FILE, ReferenceData

__all__ = [
    "CPU",
    "CaseResult",
    "ControlResult",
    "ParityReport",
    "PositionResult",
    "PromptResult",
    "Series",
    "format_error",
]

CPU = "cpu"
"""A report's device where a bundle runs on the CPU, as builds verify it."""
JSON_FILE = "parity.json"
HTML_FILE = "parity.html"


def format_error(error: float) -> str:
    """Two digits: "0.54", "3.4e-6", "1e-4"."""
    if not 0 < error < 1e-3:
        return f"{error:.2g}"
    digits, power = f"{error:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


@dataclass(frozen=True, slots=True)
class PositionResult:
    """One compared position."""

    case: str
    prompt: str
    position: int
    """Counted from the prompt's first token."""
    step: int | None
    """Greedy tokens before it; None inside the prompt."""
    error: float
    """max|difference| / max|reference|."""
    token: int
    """Our greedy token."""
    reference_token: int
    """The original's greedy token."""
    tie: bool
    """The tokens differ, and rounding decides between them."""

    def describe(self, tolerance: float) -> str:
        """The position and what is wrong with it, in one sentence without a full stop."""
        where = f"{self.case}, prompt {self.prompt!r}, position {self.position}"
        if self.step is not None:
            where += f" (greedy step {self.step})"
        verdict = "above" if not self.error <= tolerance else "within"
        tokens = (
            f"both choose token {self.token}"
            if self.token == self.reference_token
            else f"ours chooses token {self.token}, the original {self.reference_token}"
        )
        return (
            f"{where}: logit error {format_error(self.error)} is {verdict} the tolerance "
            f"{format_error(tolerance)}, and {tokens}"
        )


@dataclass(frozen=True, slots=True)
class PromptResult:
    """One prompt."""

    name: str
    kind: str
    tokens: tuple[int, ...]
    """Its ids."""
    text: str | None
    greedy_tokens: tuple[int, ...]
    """What was appended to it, token by token."""
    max_error: float


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One way of running the bundle, over all prompts."""

    key: str
    graph: str
    description: str
    positions: int
    """Positions compared; 0 where the bundle's context leaves no room for the case."""
    max_error: float
    mismatches: int
    """Greedy tokens that differ, ties included."""
    ties: int
    failures: int
    """Positions that fail."""


@dataclass(frozen=True, slots=True)
class ControlResult:
    """A comparison that must fail."""

    key: str
    description: str
    error: float | None
    """Its largest error; None where it does not apply."""
    detected: bool
    """Whether the comparison failed, as it must."""
    note: str | None
    """Why it does not apply."""

    @property
    def blind(self) -> bool:
        """Whether the check could not tell right from wrong."""
        return self.error is not None and not self.detected


@dataclass(frozen=True, slots=True)
class Series:
    """Errors along one row."""

    prompt: str
    prompt_tokens: int
    positions: tuple[int, ...]
    errors: tuple[float, ...]
    """The largest of all cases at each position."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The outcome of `qwen_export.parity.verify`."""

    source: str
    """The checkpoint."""
    num_layers: int
    backend: str
    """What ran the bundle: "onnxruntime" or "tensorrt"."""
    device: str
    """Where: "cpu", or the name of a GPU."""
    compute_dtype: str
    """Format of activations and caches there."""
    tolerance: float
    tolerance_reason: str
    prompts: tuple[PromptResult, ...]
    cases: tuple[CaseResult, ...]
    controls: tuple[ControlResult, ...]
    invariants: tuple[Invariant, ...]
    stored: StoredWeights
    """The weights file against the checkpoint."""
    quality: Quality | None
    """How far the bundle, as it is served, is from the original; None for floats on the CPU, where
    nothing but rounding is between them."""
    series: tuple[Series, ...]
    departures: tuple[PositionResult, ...]
    """Failed positions, the earliest of every case and prompt, in the order of the ladder."""
    worst: tuple[PositionResult, ...]
    """The largest errors, failed or not."""
    notes: tuple[str, ...]
    """What could not be compared, and why."""
    duration_s: float
    versions: dict[str, str]
    hashes: dict[str, str]
    """sha256 of the bundle's files, by name."""
    reference: ReferenceData

    @property
    def passed(self) -> bool:
        """Whether the bundle answers like the original, and every control was told apart."""
        compared = any(case.positions for case in self.cases)
        proved = not self.departures and not any(c.blind for c in self.controls)
        proved = proved and self.stored.problem is None
        return compared and proved and (self.quality is None or self.quality.problem is None)

    @property
    def max_error(self) -> float:
        """The largest logit error of any case."""
        return max((case.max_error for case in self.cases), default=0.0)

    @property
    def tokens_compared(self) -> int:
        """Positions whose greedy tokens were compared, over all cases."""
        return sum(case.positions for case in self.cases)

    @property
    def ties(self) -> int:
        """Tokens that differ where rounding decides."""
        return sum(case.ties for case in self.cases)

    @property
    def first_departure(self) -> str | None:
        """Where the bundle first departs from the original, in words; None if it passed."""
        if self.stored.problem is not None:
            more = len(self.stored.departed) - 1
            return self.stored.problem + (f" (and {more} more tensors)" if more else "")
        if self.departures:
            return self.departures[0].describe(self.tolerance)
        for control in self.controls:
            if control.blind:
                return (
                    f"the check is blind: with {control.key} the logit error is only "
                    f"{format_error(control.error or 0.0)}, within the tolerance "
                    f"{format_error(self.tolerance)}"
                )
        if self.quality is not None and self.quality.problem is not None:
            return self.quality.problem
        return None if self.passed else "nothing could be compared"

    def summary(self) -> ParitySummary:
        """The manifest's entry."""
        return ParitySummary(
            status="passed" if self.passed else "failed",
            max_logit_error=finite(self.max_error),
            tolerance=self.tolerance,
            tokens_compared=self.tokens_compared,
            ties=self.ties,
            quality=None if self.quality is None else self.quality.summary(),
        )

    def to_json(self) -> str:
        """parity.json: every field but the reference, described in docs/parity.md."""
        data = asdict(self)
        del data["reference"]
        head: dict[str, Any] = {
            "format": 1,
            "passed": self.passed,
            "first_departure": self.first_departure,
            "max_error": self.max_error,
            "tokens_compared": self.tokens_compared,
            "ties": self.ties,
        }
        document = _by_name(head | data)
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path) -> None:
        """Write parity.json, parity.html and reference.npz into a folder, replacing old ones."""
        self.write_pages(folder)
        self.reference.write(folder / REFERENCE_FILE)

    def write_pages(self, folder: Path) -> None:
        """Write parity.json and parity.html into a folder, replacing old ones."""
        from qwen_export.parity.page import render  # the page needs this module

        (folder / JSON_FILE).write_text(self.to_json(), "utf-8")
        (folder / HTML_FILE).write_text(render(self), "utf-8")


def _by_name(value: Any) -> Any:
    """Numbers that JSON does not have as strings: "inf", "-inf", "nan"."""
    if isinstance(value, dict):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_by_name(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
