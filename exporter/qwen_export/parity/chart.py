"""The report's two drawings as inline SVG, on a logarithmic scale of errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qwen_export.parity.report import ControlResult, Series, format_error

__all__ = ["NUM_HUES", "errors_by_step", "scale_strip"]

NUM_HUES = 10
"""Colours the style sheet defines as ``--hue-0`` and so on."""
FIRST_STEP = -48
"""Positions before the answer that the chart shows; more would squeeze the answer."""
FLOOR = 1e-9
"""Errors of 0 are drawn here."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where the plot lies in the drawing, in SVG units, and what its axes span."""

    left: float
    right: float
    top: float
    bottom: float
    low: int
    """Power of ten at the bottom."""
    high: int
    first: int
    last: int

    def x(self, step: float) -> float:
        width = self.right - self.left
        return self.left + width * (step - self.first) / max(1, self.last - self.first)

    def fraction(self, error: float) -> float:
        """Height of an error: 0 at the bottom, 1 at the top."""
        power = math.log10(min(max(error, FLOOR), 10.0**self.high))
        return min(max((power - self.low) / (self.high - self.low), 0.0), 1.0)

    def y(self, error: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.fraction(error)


def errors_by_step(series: Sequence[Series], tolerance: float) -> str:
    """Every prompt's error along its last prompt tokens and its answer, with the tolerance.

    Args:
        series: One line each.
        tolerance: Where to draw the limit.

    Returns:
        An ``<svg>`` element.
    """
    lines = [(item, _by_step(item)) for item in series]
    steps = [step for _, points in lines for step, _ in points]
    errors = [error for _, points in lines for _, error in points]
    low, high = _powers([*errors, tolerance])
    frame = _Frame(64, 944, 20, 320, low, high, min(steps), max(max(steps), min(steps) + 1))
    parts = ['<svg viewBox="0 0 960 372" role="img" aria-label="Logit error by greedy step">']
    for power in range(low, high + 1):
        y = frame.y(10.0**power)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f'10<tspan dy="-5" font-size="9">{_minus(power)}</tspan></text>'
        )
    for step in _ticks(frame.first, frame.last):
        parts.append(
            f'<text class="tick" x="{frame.x(step):.1f}" y="{frame.bottom + 20}" '
            f'text-anchor="middle">{_minus(step)}</text>'
        )
    parts.append(_answer_shade(frame))
    for index, (item, points) in enumerate(lines):
        parts.append(_line(frame, item.prompt, points, index % NUM_HUES))
    y = frame.y(tolerance)
    parts.append(
        f'<line class="limit" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="limit-label" x="{frame.right - 4}" y="{y - 6:.1f}" text-anchor="end">'
        f"tolerance {format_error(tolerance)}</text>"
        f'<text class="axis" x="{(frame.left + frame.right) / 2}" y="{frame.bottom + 44}" '
        'text-anchor="middle">greedy step (0 = last token of the prompt; below 0 = inside it)'
        "</text></svg>"
    )
    return "".join(parts)


def scale_strip(
    max_error: float, tolerance: float, controls: Sequence[ControlResult], *, passed: bool
) -> str:
    """One axis of errors: the bundle's, the tolerance, and what was wrong on purpose.

    Args:
        max_error: The bundle's largest error.
        tolerance: The limit.
        controls: The negative controls; those that do not apply are left out.
        passed: Colours the bundle's mark.

    Returns:
        An ``<svg>`` element.
    """
    marks = [(item.key, item.error) for item in controls if item.error is not None]
    low, high = _powers([max_error, tolerance, *(error for _, error in marks)])
    frame = _Frame(24, 936, 0, 0, low, high, 0, 1)
    height = 92 + 18 * len(marks)
    axis = height - 34
    parts = [f'<svg viewBox="0 0 960 {height}" role="img" aria-label="Errors on one scale">']

    def x(error: float) -> float:
        return frame.x(frame.fraction(error))

    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="14" y2="{axis}"/>'
            f'<text class="tick" x="{at:.1f}" y="{axis + 20}" text-anchor="middle">'
            f'10<tspan dy="-5" font-size="9">{_minus(power)}</tspan></text>'
        )
    at = x(tolerance)
    parts.append(
        f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="14" y2="{axis}"/>'
        f'<text class="limit-label" x="{at + 6:.1f}" y="24">tolerance {format_error(tolerance)}</text>'
    )
    rows = [("this bundle", max_error, "good" if passed else "bad")]
    rows += [(name, error, "control") for name, error in marks]
    for index, (name, error, kind) in enumerate(rows):
        y = 40 + 18 * index
        left = x(error) > (frame.left + frame.right) / 2
        anchor, shift = ("end", -10) if left else ("start", 10)
        parts.append(
            f'<circle class="mark {kind}" cx="{x(error):.1f}" cy="{y}" r="5"/>'
            f'<text class="mark-label" x="{x(error) + shift:.1f}" y="{y + 4}" '
            f'text-anchor="{anchor}">{escape(name)} {format_error(error)}</text>'
        )
    parts.append("</svg>")
    return "".join(parts)


def _by_step(item: Series) -> list[tuple[int, float]]:
    pairs = zip(item.positions, item.errors, strict=True)
    shifted = [(position - item.prompt_tokens + 1, error) for position, error in pairs]
    return [(step, error) for step, error in shifted if step >= FIRST_STEP]


def _powers(errors: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around all errors."""
    finite = [max(error, FLOOR) for error in errors if math.isfinite(error)]
    low = math.floor(math.log10(min(finite)))
    return low, max(math.ceil(math.log10(max(finite)) + 0.2), low + 1)


def _ticks(first: int, last: int) -> range:
    span = last - first
    size = next(size for size in (1, 2, 4, 8, 16, 32, 64, 128) if span / size <= 16 or size == 128)
    return range(-(-first // size) * size, last + 1, size)


def _answer_shade(frame: _Frame) -> str:
    left = max(frame.x(0), frame.left)
    return (
        f'<rect class="answer" x="{left:.1f}" y="{frame.top}" '
        f'width="{max(frame.right - left, 0):.1f}" height="{frame.bottom - frame.top}"/>'
    )


def _line(frame: _Frame, name: str, points: list[tuple[int, float]], hue: int) -> str:
    worst = max(points, key=lambda point: point[1], default=None)
    if worst is None:
        return ""
    path = " ".join(f"{frame.x(step):.1f},{frame.y(error):.1f}" for step, error in points)
    return (
        f'<g class="line" style="--hue:var(--hue-{hue})">'
        f"<title>{escape(name)}: at most {format_error(worst[1])}, at step {worst[0]}</title>"
        f'<polyline points="{path}"/>'
        f'<circle cx="{frame.x(worst[0]):.1f}" cy="{frame.y(worst[1]):.1f}" r="3"/></g>'
    )


def _minus(number: int) -> str:
    return str(number).replace("-", "\N{MINUS SIGN}")
