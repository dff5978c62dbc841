"""A benchmark's result as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape

from qwen_runtime.bench.chart import decode_chart, prefill_chart
from qwen_runtime.bench.result import BenchResult
from qwen_runtime.bench.table import COLUMNS, describe_bundle, describe_machine, method, row

__all__ = ["render"]

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b1f24; --soft: #5b6470; --edge: #dfe3e8;
  --decode: #2f6feb; --prefill: #14804a; --limit: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --card: #171b21; --text: #e6e9ed; --soft: #98a2ae; --edge: #2a313a;
    --decode: #6ea8ff; --prefill: #4cc38a; --limit: #ff8a80;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 0 0 10px; }
p { margin: 0 0 6px; }
.soft, figcaption { color: var(--soft); }
.warning { border-left: 4px solid var(--limit); padding-left: 12px; }
section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 20px 22px; margin-top: 18px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); font-size: 13px; vertical-align: bottom; }
th, td { text-align: right; padding: 6px 0 6px 14px; border-bottom: 1px solid var(--edge); }
tr:last-child td { border-bottom: 0; }
code { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
figure { margin: 0; }
svg { display: block; width: 100%; min-width: 640px; height: auto;
  font: 12px system-ui, sans-serif; }
.grid { stroke: var(--edge); } .tick, .axis { fill: var(--soft); }
.limit { fill: none; stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 6 4; }
.limit-label { fill: var(--limit); }
.decode { --hue: var(--decode); } .prefill { --hue: var(--prefill); }
.line polyline { fill: none; stroke: var(--hue); stroke-width: 1.5; stroke-linejoin: round;
  opacity: .75; }
.trend polyline { opacity: .3; }
.line circle { fill: var(--hue); } .whisker { stroke: var(--hue); stroke-width: 1.5; }
"""


def render(result: BenchResult) -> str:
    """Draw a result.

    Args:
        result: What to show.

    Returns:
        A complete HTML document without scripts or references to anything outside it, light or
        dark as the reader's browser is.
    """
    title = f"Speed of {escape(result.bundle.source)}, {result.bundle.precision}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{title}</h1><p class="soft">{escape(method(result))}</p>'
        f"{_warnings(result)}"
        f"{_figure('Time per token', decode_chart(result), _DECODE)}"
        f"{_figure('Prefill', prefill_chart(result), _PREFILL)}"
        f"<section><h2>Figures</h2>{_table(result)}</section>"
        f"<section><h2>Measured on</h2>{_facts(result)}</section>"
        "</main></body></html>\n"
    )


_DECODE = (
    "A line is one prompt length, step by step; its mark is the p50 of all steps of all runs, its "
    "whisker ends at the p99. No step that reads its bytes from memory can lie below the dashed "
    "line."
)
_PREFILL = (
    "Prompt tokens over the time to the first token; whiskers reach from the slowest run to the "
    "fastest."
)


def _figure(title: str, svg: str, caption: str) -> str:
    return (
        f"<section><h2>{title}</h2><figure>{svg}<figcaption>{caption}</figcaption></figure>"
        "</section>"
    )


def _warnings(result: BenchResult) -> str:
    return "".join(f'<p class="warning">Warning: {escape(text)}.</p>' for text in result.warnings)


def _table(result: BenchResult) -> str:
    head = "".join(f'<th scope="col">{name}<br>{unit}</th>' for name, unit in COLUMNS)
    rows = (
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in row(length)) + "</tr>"
        for length in result.lengths
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _facts(result: BenchResult) -> str:
    lines = [describe_bundle(result), *describe_machine(result)]
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"{paragraphs}<p>Repeat: <code>{escape(result.command)}</code></p>"
