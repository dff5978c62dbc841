"""A benchmark's two drawings as inline SVG: time per token and prefill speed, by length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from qwen_runtime.bench.result import BenchResult, LengthResult, Percentiles

__all__ = ["decode_chart", "prefill_chart"]

_WIDTH, _HEIGHT = 960, 372


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where the plot lies in the drawing, in SVG units, and what its axes span."""

    first: float
    """Tokens at the left end of the logarithmic axis."""
    last: float
    top_value: float
    """Value at the top of the linear axis, which begins at 0."""
    left: float = 72
    right: float = 936
    top: float = 28
    bottom: float = 310

    def x(self, tokens: float) -> float:
        span = math.log(self.last / self.first)
        return self.left + (self.right - self.left) * math.log(tokens / self.first) / span

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self.top_value


def decode_chart(result: BenchResult) -> str:
    """Milliseconds per token against the tokens in a row's cache.

    Each prompt length is a line of its steps (medians of the runs) with a mark at its p50 and a
    whisker to its p99. A faint line joins the marks; a dashed one shows what reading the bytes
    takes at the measured bandwidth.

    Returns:
        An ``<svg>`` element.
    """
    lines = [_steps(length) for length in result.lengths]
    tokens = [x for line in lines for x, _ in line]
    highest = max(_floor_ms(result, max(tokens)), *(value for line in lines for _, value in line))
    p99 = max(length.between_tokens_ms.p99 for length in result.lengths)
    # One hiccup of the machine must not squeeze everything else: its whisker leaves the drawing.
    frame = _frame(tokens, max(highest, min(p99, 2 * highest)))
    parts = _axes(
        frame,
        "Milliseconds per token by tokens in the cache",
        "tokens in a row's cache (logarithmic)",
        "ms per token",
        [length.mean_cache_tokens for length in result.lengths],
    )
    parts.append(_floor(frame, result))
    marks = [(each.mean_cache_tokens, each.between_tokens_ms.p50) for each in result.lengths]
    parts.append(f'<g class="line decode trend"><polyline points="{_points(frame, marks)}"/></g>')
    for length, line in zip(result.lengths, lines, strict=True):
        between = length.between_tokens_ms
        x, y = frame.x(length.mean_cache_tokens), frame.y(between.p50)
        parts.append(
            f'<g class="line decode"><title>{length.prompt_tokens:,} prompt tokens: p50 '
            f"{between.p50:.3g} ms, p99 {between.p99:.3g} ms per token</title>"
            f'<polyline points="{_points(frame, line)}"/>{_whisker(frame, x, between)}'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>'
        )
    return "".join([*parts, "</svg>"])


def prefill_chart(result: BenchResult) -> str:
    """Prompt tokens per second against the prompt's length.

    A mark is the median of the runs, its whisker reaches from the slowest to the fastest.

    Returns:
        An ``<svg>`` element.
    """
    speeds = [
        [length.prefill_tokens_per_s * length.ttft_ms / run.ttft_ms for run in length.runs]
        for length in result.lengths
    ]
    lengths = [length.prompt_tokens for length in result.lengths]
    frame = _frame(lengths, max(max(each) for each in speeds))
    parts = _axes(
        frame,
        "Prompt tokens per second by prompt length",
        "prompt tokens (logarithmic)",
        "tokens per second",
        lengths,
    )
    line = [(each.prompt_tokens, each.prefill_tokens_per_s) for each in result.lengths]
    parts.append(f'<g class="line prefill"><polyline points="{_points(frame, line)}"/></g>')
    for length, each in zip(result.lengths, speeds, strict=True):
        x, y = frame.x(length.prompt_tokens), frame.y(length.prefill_tokens_per_s)
        parts.append(
            f'<g class="line prefill"><title>{length.prompt_tokens:,} prompt tokens: '
            f"{length.prefill_tokens_per_s:,.0f} tokens per second</title>"
            f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(min(each)):.1f}" '
            f'y2="{frame.y(max(each)):.1f}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="4"/></g>'
        )
    return "".join([*parts, "</svg>"])


def _steps(length: LengthResult) -> list[tuple[float, float]]:
    """Tokens in the cache and milliseconds of every step, medians over the runs."""
    columns = zip(*(run.between_ms for run in length.runs), strict=True)
    return [(length.prompt_tokens + 1 + i, median(times)) for i, times in enumerate(columns)]


def _frame(tokens: Sequence[float], top: float) -> _Frame:
    # A margin on both sides, so that marks stay inside and a single length has an axis at all.
    return _Frame(min(tokens) / 1.15, max(tokens) * 1.15, _round_up(1.05 * top))


def _round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next((n for n in (1, 1.5, 2, 3, 4, 5, 6, 8) if n * power >= value), 10) * power


def _whisker(frame: _Frame, x: float, between: Percentiles) -> str:
    """From p50 to p99; one that leaves the drawing says where it would end."""
    start, inside = frame.y(between.p50), between.p99 <= frame.top_value
    end = frame.y(between.p99) if inside else frame.top
    line = f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{start:.1f}" y2="{end:.1f}"/>'
    if inside:
        return (
            f'{line}<line class="whisker" x1="{x - 5:.1f}" x2="{x + 5:.1f}" y1="{end:.1f}" '
            f'y2="{end:.1f}"/>'
        )
    return (
        f'{line}<text class="tick" x="{x + 6:.1f}" y="{end + 12:.1f}">p99 {between.p99:.3g} ms'
        "</text>"
    )


def _axes(
    frame: _Frame, title: str, x_label: str, y_label: str, tokens: Sequence[float]
) -> list[str]:
    """The opened drawing with grid, ticks at the measured lengths, and labels."""
    size = f"0 0 {_WIDTH} {_HEIGHT}"
    parts = [f'<svg viewBox="{size}" role="img" aria-label="{title}"><title>{title}</title>']
    for tick in range(5):
        value = frame.top_value * tick / 4
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{value:,.4g}</text>"
        )
    room = -math.inf
    for value in tokens:
        x = frame.x(value)
        if x - room < 48:  # the labels would touch
            continue
        room = x
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.top}" y2="{frame.bottom}"/>'
            f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 20}" text-anchor="middle">'
            f"{value:,.0f}</text>"
        )
    middle = (frame.top + frame.bottom) / 2
    parts.append(
        f'<text class="axis" x="{(frame.left + frame.right) / 2}" y="{frame.bottom + 44}" '
        f'text-anchor="middle">{x_label}</text>'
        f'<text class="axis" x="16" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle})">{y_label}</text>'
    )
    return parts


def _floor(frame: _Frame, result: BenchResult) -> str:
    """The time that reading the bytes takes, along the whole axis."""
    ratio = frame.last / frame.first
    along = [frame.first * ratio ** (step / 32) for step in range(33)]
    points = [(tokens, _floor_ms(result, tokens)) for tokens in along]
    key = frame.top - 8
    return (
        f'<polyline class="limit" points="{_points(frame, points)}"/>'
        f'<line class="limit" x1="{frame.left}" x2="{frame.left + 30}" y1="{key}" y2="{key}"/>'
        f'<text class="limit-label" x="{frame.left + 38}" y="{key + 4}">reading the bytes at '
        f"{result.read_bandwidth / 1e9:.1f} GB/s</text>"
    )


def _floor_ms(result: BenchResult, tokens: float) -> float:
    """Milliseconds that reading a step's bytes takes with so many tokens in each row's cache."""
    return 1e3 * result.streamed.step(result.options.batch, tokens) / result.read_bandwidth


def _points(frame: _Frame, line: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{frame.x(tokens):.1f},{frame.y(value):.1f}" for tokens, value in line)
