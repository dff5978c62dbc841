"""The peer benchmark's ratios and verdicts, which decide what is claimed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peers" / "report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers_report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_ratio_pairs_rounds_before_it_takes_the_median(report: ModuleType) -> None:
    ours = report.Samples("", step_s={128: [0.1, 0.2, 0.4]})
    peer = report.Samples("", step_s={128: [0.4, 0.1, 0.2]})

    assert report.ratio(ours, peer, "decode", 128) == pytest.approx((0.5, 0.5, 4.0))


def test_a_prefill_rate_counts_the_tokens_of_the_prompt(report: ModuleType) -> None:
    samples = report.Samples("", prefill_s={900: [3.0, 4.5]})

    assert samples.rates("prefill", 900) == pytest.approx([300, 200])


def test_a_ratio_needs_both_sides_in_the_same_rounds(report: ModuleType) -> None:
    ours = report.Samples("", step_s={128: [0.1, 0.2]})
    peer = report.Samples("", step_s={128: [0.2]})

    with pytest.raises(ValueError, match="got 2 of ours and 1 of the peer"):
        report.ratio(ours, peer, "decode", 128)


def test_claims_are_won_or_lost_at_every_length_by_their_factor(report: ModuleType) -> None:
    measured = {
        "ours int4": report.Samples("", step_s={128: [0.010], 900: [0.010]}),
        "genai int4": report.Samples("", step_s={128: [0.015], 900: [0.013]}),
    }

    rows = report.verdicts(measured, [128, 900])

    assert [(row["claim"], row["verdict"]) for row in rows] == [
        ("ours int4 decode at 128 ≥ 1.4 x genai int4", "won"),
        ("ours int4 decode at 900 ≥ 1.4 x genai int4", "lost"),
    ]


def test_the_table_has_a_row_for_every_contender_and_every_verdict(report: ModuleType) -> None:
    measured = {
        name: report.Samples("flags", {"tool": "1.0"}, prefill_s={8: [t]}, step_s={8: [t]})
        for name, t in (("ours int8", 0.1), ("llama.cpp Q8_0", 0.125))
    }

    table = report.markdown(measured, [8])

    assert "| ours int8 | 80.0 (80.0-80.0) | 10.0 (10.0-10.0) |" in table
    assert "| llama.cpp Q8_0 | flags | tool 1.0 |" in table
    assert (
        "| ours int8 decode at 8 ≥ 1.0 x llama.cpp Q8_0 | gate | 1.25 (1.25-1.25) | won |" in table
    )
