"""What was measured, as ratios against the goals and as a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["CLAIMS", "Claim", "Samples", "figure", "markdown", "ratio", "verdicts"]


@dataclass(slots=True)
class Samples:
    """Raw measurements of one contender; the n-th of each list is from the n-th round."""

    settings: str
    """How it was run."""
    versions: dict[str, str] = field(default_factory=dict)
    model_mb: float = 0.0
    """Of the model on disk."""
    correlation: float = 0.0
    """Of its logits with those of our fp32 bundle; the lowest of three positions."""
    prefill_s: dict[int, list[float]] = field(default_factory=dict)
    """By length of the prompt."""
    step_s: dict[int, list[float]] = field(default_factory=dict)
    """Per decoded token, by length of the prompt before it."""
    load_s: list[float] = field(default_factory=list)
    """In a process of its own each; the files are in the page cache."""
    anonymous_mb: float = 0.0
    """Of the process after decoding."""
    peak_mb: float = 0.0
    """Largest resident memory of the process, mapped files included."""

    def rates(self, phase: str, length: int) -> list[float]:
        """Tokens per second of "prefill" or "decode", by round."""
        if phase == "prefill":
            return [length / seconds for seconds in self.prefill_s.get(length, [])]
        return [1 / seconds for seconds in self.step_s.get(length, [])]


@dataclass(frozen=True, slots=True)
class Claim:
    """That ours is so many times as fast as a peer."""

    kind: str
    """"gate" or "goal"."""
    ours: str
    peer: str
    phase: str
    """"prefill" or "decode"."""
    factor: float


CLAIMS = (
    Claim("gate", "ours int4", "genai int4", "decode", 1.4),
    Claim("gate", "ours int4", "genai int4-128", "decode", 1.4),
    Claim("gate", "ours int8", "llama.cpp Q8_0", "decode", 1.0),
    Claim("gate", "ours int8", "llama.cpp Q8_0", "prefill", 1.2),
    Claim("goal", "ours int4", "llama.cpp Q4_0", "decode", 1.1),
    Claim("goal", "ours int8", "transformers bf16", "prefill", 1.2),
)


def ratio(ours: Samples, peer: Samples, phase: str, length: int) -> tuple[float, float, float]:
    """How many times as fast ours is: median, lowest and highest of the rounds.

    Raises:
        ValueError: If they were not measured in the same rounds.
    """
    mine, theirs = ours.rates(phase, length), peer.rates(phase, length)
    if not mine or len(mine) != len(theirs):
        raise ValueError(
            f"{phase} at {length} must be measured in the same rounds, "
            f"got {len(mine)} of ours and {len(theirs)} of the peer"
        )
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def verdicts(measured: dict[str, Samples], lengths: Sequence[int]) -> list[dict[str, object]]:
    """Every claim whose two sides were measured, at every length, won or lost."""
    rows: list[dict[str, object]] = []
    for claim in CLAIMS:
        if claim.ours not in measured or claim.peer not in measured:
            continue
        for length in lengths:
            pair = measured[claim.ours], measured[claim.peer]
            median, low, high = ratio(*pair, claim.phase, length)
            rows.append(
                {
                    "claim": f"{claim.ours} {claim.phase} at {length} ≥ "
                    f"{claim.factor} x {claim.peer}",
                    "kind": claim.kind,
                    "ratio": median,
                    "lowest": low,
                    "highest": high,
                    "verdict": "won" if median >= claim.factor else "lost",
                }
            )
    return rows


def figure(values: Sequence[float]) -> str:
    """Median with the lowest and the highest behind it."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    digits = 0 if middle >= 100 else 1
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def markdown(measured: dict[str, Samples], lengths: Sequence[int]) -> str:
    """Tables of speed, memory, settings and verdicts."""
    phases = [(phase, length) for phase in ("prefill", "decode") for length in lengths]
    lines = [
        *_head("tok/s, median (lowest-highest)", *(f"{phase} {n}" for phase, n in phases)),
        *(
            _row(name, *(figure(samples.rates(phase, n)) for phase, n in phases))
            for name, samples in measured.items()
        ),
        "",
        *_head("", "load, s", "model, MB", "anonymous, MB", "peak, MB", "logits' correlation"),
        *(
            _row(
                name,
                figure(s.load_s),
                f"{s.model_mb:.0f}",
                f"{s.anonymous_mb:.0f}",
                f"{s.peak_mb:.0f}",
                f"{s.correlation:.5f}",
            )
            for name, s in measured.items()
        ),
        "",
        *_head("", "settings", "versions"),
        *(
            _row(name, s.settings, ", ".join(f"{k} {v}" for k, v in s.versions.items()))
            for name, s in measured.items()
        ),
        "",
        *_head("claim", "", "ratio (lowest-highest)", ""),
        *(
            _row(
                str(row["claim"]),
                str(row["kind"]),
                f"{row['ratio']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f})",
                str(row["verdict"]),
            )
            for row in verdicts(measured, lengths)
        ),
    ]
    return "\n".join(lines)


def _head(*cells: str) -> list[str]:
    return [_row(*cells), "|" + "---|" * len(cells)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
