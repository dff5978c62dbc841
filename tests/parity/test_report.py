"""parity.json, parity.html and reference.npz."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from qwen_export.parity import ParityReport
from qwen_export.parity.page import render
from qwen_export.parity.quality import Quality
from qwen_export.parity.report import PositionResult, format_error

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Balance(HTMLParser):
    """Checks that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A drawing's empty element."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def failed_report(untied_report: ParityReport) -> ParityReport:
    departure = PositionResult("prefill whole", "short", 6, 0, float("inf"), 3, 4, False)
    cases = (replace(untied_report.cases[0], max_error=float("inf"), failures=1),)
    return replace(untied_report, departures=(departure,), cases=cases, worst=(departure,))


def test_report_writes_its_three_files(untied_report: ParityReport, tmp_path: Path) -> None:
    untied_report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "parity.html", "parity.json", "reference.npz",
    ]  # fmt: skip
    data = json.loads((tmp_path / "parity.json").read_text())
    assert data["passed"] is True
    assert data["first_departure"] is None
    assert data["max_error"] == untied_report.max_error
    assert len(data["cases"]) == len(untied_report.cases)
    assert data["versions"]["transformers"]
    assert len(data["hashes"]["weights.bin"]) == 64


def test_infinite_error_is_valid_json_and_a_valid_summary(failed_report: ParityReport) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(failed_report.to_json(), parse_constant=refuse)
    assert data["max_error"] == "inf"
    assert data["passed"] is False
    error = failed_report.summary().max_logit_error
    assert error is not None
    assert np.isfinite(error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quality_that_is_not_finite_is_valid_json_and_a_valid_summary(
    untied_report: ParityReport, bad: float
) -> None:
    quality = Quality(10, bad, bad, 1.0, 0.5, bad, bad, bad, bad, bad)
    report = replace(untied_report, quality=quality)
    data = json.loads(report.to_json())
    assert data["quality"]["mean_kl"] == str(bad)
    summary = report.summary().quality
    assert summary is not None
    largest = sys.float_info.max
    assert (summary.mean_kl, summary.max_kl, summary.max_logit_error) == (largest,) * 3
    assert (summary.served_error, summary.mean_served_error) == (largest,) * 2


def test_page_refers_to_nothing_outside_it(untied_report: ParityReport) -> None:
    page = render(untied_report)
    assert not re.search(r"https?://|<script|<link|@import|url\(|src=", page)
    balance = Balance()
    balance.feed(page)
    assert balance.open == []


def test_page_of_a_sound_bundle_says_so_on_top(untied_report: ParityReport) -> None:
    page = render(untied_report)
    assert "Parity passed." in page
    assert "qwen2_untied answers like the original" in page
    assert "Where it departs" not in page
    assert page.count('class="line"') == len(untied_report.prompts)
    assert "prefers-color-scheme: dark" in page


def test_page_of_a_failed_bundle_names_the_first_departure(failed_report: ParityReport) -> None:
    page = render(failed_report)
    assert "Parity failed." in page
    assert "position 6 (greedy step 0): logit error inf is above the tolerance 1e-4" in page
    assert "ours chooses token 3, the original 4" in page
    assert "Where it departs" in page


def test_page_escapes_what_prompts_contain(untied_report: ParityReport) -> None:
    prompt = replace(untied_report.prompts[0], text="<script>alert(1)</script>")
    page = render(replace(untied_report, prompts=(prompt,)))
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_exact_equality_needs_no_margin(untied_report: ParityReport) -> None:
    cases = tuple(replace(case, max_error=0.0) for case in untied_report.cases)
    series = tuple(
        replace(item, errors=tuple(0.0 for _ in item.errors)) for item in untied_report.series
    )
    assert "exactly the original" in render(replace(untied_report, cases=cases, series=series))


def test_report_without_a_compared_position_does_not_pass(untied_report: ParityReport) -> None:
    cases = tuple(replace(case, positions=0) for case in untied_report.cases)
    empty = replace(untied_report, cases=cases)
    assert not empty.passed
    assert empty.first_departure == "nothing could be compared"


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.0, "0"), (0.54, "0.54"), (3.4e-6, "3.4e-6"), (1e-4, "1e-4"), (float("inf"), "inf")],
)
def test_errors_are_written_with_two_digits(error: float, text: str) -> None:
    assert format_error(error) == text
