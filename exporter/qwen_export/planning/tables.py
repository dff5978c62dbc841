"""A plan for people: tables of rich."""

from __future__ import annotations

import shutil
from typing import Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from qwen_export.planning.planner import Plan, PrecisionPlan
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.engine.prefix import KEPT_SLOTS

__all__ = ["print_plan"]

_MB = 1e6
_COLUMNS = 100
"""Width where the output is no terminal and $COLUMNS names none."""
_LEAST_COLUMNS = 80
"""Width below which tables are not squeezed any further."""
_MOST_COLUMNS = 1000
"""More than a table of numbers can need."""


def print_plan(plan: Plan) -> None:
    """Print a plan to stdout, as wide as the terminal or $COLUMNS, or 100 columns."""
    # rich looks at $COLUMNS and the terminal too, but takes 80 for what is neither.
    width = max(shutil.get_terminal_size((_COLUMNS, 0)).columns, _LEAST_COLUMNS)
    console = Console(highlight=False, width=width)
    at = f" at {plan.revision}" if plan.revision else ""
    console.print(Text(f"{plan.model}{at}", "bold"))
    if plan.refusal is not None:
        console.print(Text(f"cannot be built: {plan.refusal}", "red"))
    _print_numbers("Parameters", _parameters(plan), width)
    if plan.settings:
        console.print(Text("\nSettings (! = a trap)", "bold"))
        console.print(_settings(plan))
    bandwidth = f"{(plan.bandwidth or 0) / 1e9:.1f} GB/s read by {plan.threads} threads"
    for title, table in (
        ("Bundle on disk and build, MB", _disk(plan)),
        ("Memory at run time, MB", _memory(plan)),
        (f"Decode of one row on this CPU, {bandwidth}", _speed(plan)),
    ):
        if table.row_count:
            _print_numbers(title, table, width)
    for entry in plan.precisions:
        if entry.refusal is not None:
            console.print(Text(f"{entry.precision} cannot be built: {entry.refusal}", "red"))
    console.print(_notes(plan))


def _print_numbers(title: str, table: Table, width: int) -> None:
    """Print a table whose cells stay whole: a number that is cut is another number."""
    needed = Console(width=_MOST_COLUMNS).measure(table).maximum
    console = Console(highlight=False, width=max(width, needed))
    console.print(Text(f"\n{title}", "bold"))
    console.print(table)


def _table(*columns: str, numbers: int) -> Table:
    """A table whose last columns, ``numbers`` of them, are aligned to the right."""
    table = Table(
        box=None,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, column in enumerate(columns):
        right = i >= len(columns) - numbers
        justify: Literal["left", "right"] = "right" if right else "left"
        table.add_column(column, justify=justify, no_wrap=True, vertical="bottom")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("part", "count", "share", numbers=2)
    for part, count in plan.parameters_by_part.items():
        table.add_row(part, f"{count:,}", f"{count / plan.num_parameters:.1%}")
    table.add_row("total", f"{plan.num_parameters:,}", f"{plan.checkpoint_bytes / _MB:,.1f} MB")
    return table


def _settings(plan: Plan) -> Table:
    table = Table(
        *("", Column("setting", no_wrap=True), Column("value", overflow="fold"), "note"),
        box=None,
        pad_edge=False,
    )
    for setting in plan.settings:
        style = "yellow" if setting.trap else ""
        row = ("!" if setting.trap else "", setting.name, setting.value, setting.note)
        table.add_row(*(Text(cell, style) for cell in row))
    return table


def _disk(plan: Plan) -> Table:
    table = _table(
        *("format", "weights\n.bin", "graphs", "text", "reports", "total"),
        *("packed\ncache", "RAM to\nbuild", "and to\nverify"),
        numbers=8,
    )
    for entry in _possible(plan):
        disk = entry.disk
        if disk is None:
            continue
        sizes = (disk.weights, disk.graphs, disk.text, disk.reports, disk.total)
        others = (entry.packed_cache, entry.build_peak, entry.verified_build_peak)
        table.add_row(
            entry.precision,
            *(f"{size / _MB:,.1f}" for size in sizes),
            *map(_whole, others),
        )
    return table


def _memory(plan: Plan) -> Table:
    table = _table(
        *("format", "where", "rows", "tokens\na row", "weights", "mapped", "KV\ncache"),
        *("kept\nprompts", "activa-\ntions", "process", "total"),
        numbers=9,
    )
    for entry in _possible(plan):
        for use in entry.memory:
            sizes = (
                use.weights,
                use.mapped,
                use.kv_cache,
                use.kept_prompts,
                use.activations,
                use.outgrown + use.process,
                use.total,
            )
            where = "CPU" if use.device == "cpu" else f"GPU {use.compute_dtype}"
            table.add_row(
                entry.precision, where, str(use.batch), f"{use.context:,}", *map(_whole, sizes)
            )
    return table


def _speed(plan: Plan) -> Table:
    table = _table(
        *("format", "tokens\na row", "MB per\ntoken", "ceiling,\ntok/s", "expected,\ntok/s"),
        numbers=4,
    )
    for entry in _possible(plan):
        for speed in entry.speed:
            table.add_row(
                entry.precision,
                f"{speed.context:,}",
                f"{speed.bytes_per_token / _MB:,.1f}",
                f"{speed.ceiling:,.1f}",
                f"{speed.expected:,.1f}",
            )
    return table


def _possible(plan: Plan) -> list[PrecisionPlan]:
    return [entry for entry in plan.precisions if entry.refusal is None]


def _notes(plan: Plan) -> Text:
    devices = {use.device for entry in plan.precisions for use in entry.memory}
    notes = []
    if devices:
        notes.append(
            f"Kept prompts: LLM keeps {KEPT_SLOTS} prompts, running ones included, for others "
            "that begin like them; LLM(prefix_cache_slots=0) keeps none."
        )
    if "cpu" in devices:
        notes.append(
            "Mapped pages belong to weights.bin or the packed cache; the system may drop them "
            "when memory is short."
        )
    if "cpu" in devices and any(
        entry.precision != "fp32" and not entry.lowered for entry in _possible(plan)
    ):
        notes.append(
            "int8 and int4 run the portable graph on a CPU: the faster one has an attention that "
            "does not take this head_dim."
        )
    if any(entry.packed_cache for entry in plan.precisions):
        notes.append(
            "Packed cache: what the first run on a CPU leaves on disk in the user's cache folder; "
            f"{CACHE_VARIABLE}=off packs in memory at every load instead."
        )
    if "gpu" in devices:
        notes.append(
            "GPU: weights, caches and activations alone; add what the driver and the engine's "
            "library take."
        )
    return Text("\n" + "\n".join(notes), "dim") if notes else Text()


def _whole(num_bytes: int) -> str:
    return f"{num_bytes / _MB:,.0f}"
