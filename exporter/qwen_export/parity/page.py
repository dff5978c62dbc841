"""parity.html: the report for a reader with a browser and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from qwen_export.parity.chart import NUM_HUES, errors_by_step, scale_strip
from qwen_export.parity.quality import Quality
from qwen_export.parity.report import (
    CPU,
    ControlResult,
    ParityReport,
    PositionResult,
    format_error,
)
from qwen_export.parity.stored import StoredWeights

__all__ = ["render"]

_BACKENDS = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}
MAX_TEXT = 90
"""Characters of a prompt shown in the table."""


def render(report: ParityReport) -> str:
    """Draw a report.

    Args:
        report: What to show.

    Returns:
        A complete HTML document without references to anything outside it.
    """
    state = "passed" if report.passed else "failed"
    style = resources.files("qwen_export.parity").joinpath("page.css").read_text("utf-8")
    sections = [
        _verdict(report, state),
        _compared(report),
        _section(
            "Error by step and prompt",
            f"<figure>{errors_by_step(report.series, report.tolerance)}<figcaption>The largest "
            "error of all cases at each position. Point at a line for its prompt; the shaded part "
            "is the answer.</figcaption></figure>",
        ),
        _section("Prompts", _prompts(report)),
        _section("Stored weights", _stored(report.stored)),
        _section("Cases", _cases(report)),
        _section("Negative controls", _controls(report)),
        *(
            [_section("As it is served", _quality(report, report.quality))]
            if report.quality
            else []
        ),
        _section("The same tokens, run two ways", _invariants(report)),
        *(
            [_section("Where it departs", _positions(report.departures))]
            if report.departures
            else []
        ),
        _section("Largest errors", _positions(report.worst)),
        _section("Made with", _versions(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Parity {state}: {escape(report.source)}</title><style>\n{style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _verdict(report: ParityReport, state: str) -> str:
    if report.passed:
        detail = (
            f"At {report.tokens_compared:,} compared positions the largest logit error was "
            f"{format_error(report.max_error)}, {_margin(report)}, and "
            + (
                "every greedy token was the same."
                if not report.ties
                else f"every greedy token was the same but {report.ties} decided by rounding."
            )
        )
    else:
        detail = f"It first departs here: {escape(report.first_departure or '')}."
    says = "answers" if report.passed else "does <strong>not</strong> answer"
    facts = (
        ("largest logit error", f"{format_error(report.max_error)}"),
        ("tolerance", f"{format_error(report.tolerance)}"),
        ("positions compared", f"{report.tokens_compared:,}"),
        ("ties", str(report.ties)),
        ("took", f"{report.duration_s:.1f} s"),
    )
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return (
        f'<section class="verdict {state}"><h1><strong>Parity {state}.</strong> '
        f"{escape(report.source)} {says} like the original.</h1><p>{detail}</p>"
        f'<dl class="facts">{items}</dl></section>'
    )


def _margin(report: ParityReport) -> str:
    if not report.max_error:
        return "exactly the original's values"
    return f"{report.tolerance / report.max_error:,.0f} times below the tolerance"


def _compared(report: ParityReport) -> str:
    steps = sum(len(prompt.greedy_tokens) for prompt in report.prompts)
    body = (
        f"<p>{len(report.prompts)} prompts and {steps} greedy tokens after them went through the "
        f"bundle, in {report.compute_dtype} {_place(report)}, and through transformers' own "
        f"{report.num_layers} layers in fp32 PyTorch, teacher-forced: the original sees the "
        "tokens the bundle chose, and must choose the same ones.</p>"
        "<p>The error of a position is max|difference| / max|original logit| over the whole "
        f"vocabulary. The tolerance is {format_error(report.tolerance)} because "
        f"{escape(report.tolerance_reason)}. A token that differs is a tie only where the "
        "original's two best logits are closer than 10 times the difference.</p>"
    )
    if report.quality is not None and report.device == CPU:
        body += (
            "<p>The weights are quantised: the original was given the bundle's own weights, codes "
            "times scales, and the bundle multiplied them in fp32.</p>"
        )
    body += "".join(f'<p class="soft">Note: {escape(note)}.</p>' for note in report.notes)
    return _section("What was compared", body)


def _place(report: ParityReport) -> str:
    name = _BACKENDS.get(report.backend, report.backend)
    return f"with {escape(name)} on {escape(report.device)}"


def _prompts(report: ParityReport) -> str:
    rows = []
    for index, prompt in enumerate(report.prompts):
        text = prompt.text if prompt.text is not None else " ".join(map(str, prompt.tokens[:16]))
        shown = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
        rows.append(
            [
                _name(prompt.name, index % NUM_HUES),
                str(len(prompt.tokens)),
                str(len(prompt.greedy_tokens)),
                _error(prompt.max_error, report.tolerance),
                f'<span class="text">{escape(shown)}</span>',
            ]
        )
    return _table(("prompt", "tokens", "greedy steps", "largest error", "begins"), rows, (1, 2, 3))


def _name(prompt: str, hue: int) -> str:
    swatch = f'<span class="swatch" style="--hue:var(--hue-{hue})"></span>'
    return f'{swatch}<span class="name">{escape(prompt)}</span>'


def _cases(report: ParityReport) -> str:
    rows = [
        [
            f"{escape(case.key)}<br><span class='soft'>{escape(case.description)}</span>",
            f"{case.graph}.onnx",
            f"{case.positions:,}" if case.positions else "no room",
            _error(case.max_error, report.tolerance) if case.positions else "",
            f"{case.mismatches - case.ties}" if case.positions else "",
            f"{case.ties}" if case.positions else "",
        ]
        for case in report.cases
    ]
    heads = ("case", "graph", "positions", "largest error", "wrong tokens", "ties")
    return _table(heads, rows, (2, 3, 4, 5))


def _controls(report: ParityReport) -> str:
    strip = scale_strip(report.max_error, report.tolerance, report.controls, passed=report.passed)
    rows = [
        [
            f"{escape(item.key)}<br><span class='soft'>{escape(item.description)}</span>",
            "" if item.error is None else f"{format_error(item.error)}",
            _control_verdict(item),
        ]
        for item in report.controls
    ]
    return (
        "<p>Comparisons that are wrong on purpose. Each must fail, or the check could not tell "
        f"right from wrong.</p><figure>{strip}</figure>"
        + _table(("control", "error", "told apart"), rows, (1,))
    )


def _control_verdict(item: ControlResult) -> str:
    if item.note is not None:
        return f'<span class="soft">does not apply: {escape(item.note)}</span>'
    return "yes" if item.detected else "<strong>no: the check is blind</strong>"


def _stored(stored: StoredWeights) -> str:
    rows = [
        ["tensors compared", f"{stored.tensors:,}"],
        ["with the checkpoint's own bits", f"{stored.exact:,}"],
        ["not made of the checkpoint's", f"{len(stored.departed):,}"],
    ]
    if stored.worst is not None:
        rows += [
            ["largest relative squared error of an output", f"{format_error(stored.max_error)}"],
            ["largest share of what codes may cost", f"{stored.max_share:.1%}, {stored.worst}"],
        ]
    problem = "" if stored.problem is None else f"<p>{escape(stored.problem)}.</p>"
    return (
        "<p>Every value of the weights file was compared with the checkpoint. Floats and codes of "
        "a quantised checkpoint must be the same numbers; where weights were quantised, no output "
        "may be further off than half a step of each weight's block, for gptq two steps.</p>"
        + problem
        + _table(("", ""), [[escape(name), escape(value)] for name, value in rows], (1,))
    )


def _quality(report: ParityReport, quality: Quality) -> str:
    on_cpu = report.device == CPU
    exact, rounding = (
        ("fp32 activations", "int8 activations")
        if on_cpu
        else ("the bundle's weights in fp32", report.compute_dtype)
    )
    rows = [
        ["positions", f"{quality.positions:,}"],
        ["same token as the original", f"{quality.top1_agreement:.1%}"],
        ["KL(original || served), mean", f"{format_error(quality.mean_kl)} nats"],
        ["KL(original || served), largest", f"{format_error(quality.max_kl)} nats"],
        [f"KL(original || {exact}), mean", f"{format_error(quality.exact_mean_kl)} nats"],
        ["KL of ignoring the context", f"{format_error(quality.context_kl)} nats"],
        ["logit error against the original, mean", format_error(quality.mean_logit_error)],
        ["logit error against the original, largest", format_error(quality.max_logit_error)],
        [f"logit error of {rounding}, mean", format_error(quality.mean_served_error)],
        [f"logit error of {rounding}, largest", format_error(quality.max_served_error)],
    ]
    told = (
        "Everything above is computed with fp32 activations, and its original has the bundle's "
        "own weights, codes times scales: it proves the graphs. Requests are served with int8 "
        "activations; below, that is compared with the original's unquantised weights."
        if on_cpu
        else "The same run, against the original in fp32 with its own weights. Above, the original "
        "of a quantised bundle has the bundle's weights, codes times scales."
    )
    table = _table(("", ""), [[escape(name), value] for name, value in rows], (1,))
    return f"<p>{told}</p>{table}"


def _invariants(report: ParityReport) -> str:
    rows = [
        [escape(item.name), "yes" if item.bit_equal else "no", f"{format_error(item.difference)}"]
        for item in report.invariants
    ]
    return _table(("", "same bits", "largest difference"), rows, (2,))


def _positions(items: Iterable[PositionResult]) -> str:
    rows = [
        [
            escape(item.case),
            escape(item.prompt),
            str(item.position),
            "" if item.step is None else str(item.step),
            f"{format_error(item.error)}",
            str(item.token),
            str(item.reference_token) + (" (tie)" if item.tie else ""),
        ]
        for item in items
    ]
    heads = ("case", "prompt", "position", "step", "error", "our token", "original's token")
    return _table(heads, rows, (2, 3, 4, 5, 6))


def _versions(report: ParityReport) -> str:
    versions = [[escape(name), f"<code>{escape(v)}</code>"] for name, v in report.versions.items()]
    hashes = [[escape(name), f"<code>{v}</code>"] for name, v in report.hashes.items()]
    return _table(("", "version"), versions, ()) + (
        "<details><summary>sha256 of the bundle's files</summary>"
        + _table(("file", "sha256"), hashes, ())
        + "</details>"
    )


def _error(error: float, tolerance: float) -> str:
    within = error <= tolerance
    return f"{format_error(error)}" if within else f"<strong>{format_error(error)} ✗</strong>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    def cell(tag: str, index: int, content: str) -> str:
        kind = ' class="n"' if index in numbers else ""
        return f"<{tag}{kind}>{content}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(cell("td", i, content) for i, content in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
