"""A benchmark's result as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from qwen_runtime.bench.environment import Environment
from qwen_runtime.bench.result import BenchResult, LengthResult

__all__ = ["COLUMNS", "describe_bundle", "describe_machine", "method", "row", "table"]

COLUMNS = (
    ("prompt", "tokens"),
    ("first token", "ms"),
    ("prefill", "tok/s"),
    ("per token p50", "ms"),
    ("per token p99", "ms"),
    ("decode", "tok/s"),
    ("outside model", "ms"),
    ("read per token", "MB"),
    ("read speed", "GB/s"),
    ("of measured", "%"),
)
"""Head and unit of every column."""
_WIDTH = 80
_HEAD_WIDTH = 8
"""Of a head in a terminal, which has as many lines as its words need."""


def table(result: BenchResult) -> str:
    """Lay out a result: bundle, machine, figures by prompt length, and how to repeat it."""
    heads = [textwrap.wrap(head, _HEAD_WIDTH) for head, _ in COLUMNS]
    height = max(map(len, heads))
    rows = [*zip(*([""] * (height - len(head)) + head for head in heads), strict=True)]
    figures = [[unit for _, unit in COLUMNS], *(row(length) for length in result.lengths)]
    facts = [describe_bundle(result), *describe_machine(result)]
    lines = [*_wrapped(facts), "", *_aligned([*rows, *figures]), "", *_wrapped([method(result)])]
    # Not wrapped: it is there to be copied.
    return "\n".join([*lines, f"Repeat: {result.command}"])


def row(length: LengthResult) -> list[str]:
    """The cells of one prompt length, in the order of `COLUMNS`."""
    between = length.between_tokens_ms
    return [
        f"{length.prompt_tokens:,}",
        _number(length.ttft_ms),
        _number(length.prefill_tokens_per_s),
        _number(between.p50),
        _number(between.p99),
        _number(length.decode_tokens_per_s),
        _number(length.host_per_token_ms),
        _number(length.bytes_per_token / 1e6),
        _number(length.bytes_per_s / 1e9),
        f"{100 * length.bandwidth_share:.0f}",
    ]


def describe_bundle(result: BenchResult) -> str:
    """Which bundle it is."""
    bundle = result.bundle
    graph = f"graph {bundle.graph}, " if bundle.graph is not None else ""
    return (
        f"{bundle.source}: {bundle.precision} weights ({bundle.weights_bytes / 1e6:,.1f} MB), "
        f"{bundle.compute_dtype} compute, {graph}parity {bundle.parity.replace('_', ' ')}, "
        f"manifest {bundle.manifest_sha256[:12]}"
    )


def describe_machine(result: BenchResult) -> list[str]:
    """Machine, software, and what the process took."""
    environment = result.environment
    peak = result.peak_memory_bytes and result.peak_memory_bytes / 1e6
    versions = (f"{name} {version}" for name, version in environment.versions.items())
    speeds = (
        f"read bandwidth {result.read_bandwidth / 1e9:.1f} GB/s",
        f"load average {_load(environment)} before",
        f"others' work {_or_unknown(result.other_cores, '{:.2f} CPUs')}",
    )
    return [
        _hardware(environment),
        ", ".join([environment.os, f"Python {environment.python}", *versions]),
        ", ".join(speeds),
        f"loaded in {result.load_s:.2f} s, peak memory {_or_unknown(peak, '{:,.0f} MB')}",
    ]


def method(result: BenchResult) -> str:
    """How the figures came about."""
    options = result.options
    rows = "1 row" if options.batch == 1 else f"{options.batch} rows together"
    runs = "1 run" if options.repeat == 1 else f"medians of {options.repeat} runs"
    return (
        f"{rows}, {options.new_tokens} new tokens each, {runs} after one that does not count; "
        "greedy, end tokens ignored, random prompts. Times are those of a reader of the stream."
    )


def _hardware(environment: Environment) -> str:
    memory = environment.memory_bytes and environment.memory_bytes / (1 << 30)
    clock = f" at {environment.cpu_mhz / 1e3:.2f} GHz" if environment.cpu_mhz else ""
    return (
        f"{environment.cpu}{clock}, {environment.cores} cores, {environment.threads} threads, "
        f"{_or_unknown(memory, '{:.1f} GiB')} memory"
    )


def _load(environment: Environment) -> str:
    if environment.load_average is None:
        return "unknown"
    return f"{environment.load_average[0]:.2f}"


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


def _number(value: float) -> str:
    """Three digits that count, and thousands in groups."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def _wrapped(paragraphs: Sequence[str]) -> list[str]:
    return [line for text in paragraphs for line in textwrap.wrap(text, _WIDTH)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
