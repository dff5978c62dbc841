"""A short soak of a served bundle, and what the soak would say if something were wrong."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from qwen_runtime import LLM

SERVING = Path(__file__).parents[2] / "benchmarks" / "serving"
KINDS = {
    "whole",
    "streamed",
    "refused",
    "left in the middle",
    "not waited for",
    "read slowly",
}

Problem = Callable[[str, Any], "str | None"]


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The soak's modules by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SERVING))
        patch.syspath_prepend(str(SERVING.parent))
        return {name: importlib.import_module(name) for name in ("cases", "visitor", "soak")}


@pytest.fixture(scope="module")
def cases(modules: dict[str, ModuleType], embedded_llm: LLM) -> list[Any]:
    """Good requests with short answers."""
    found: list[Any] = modules["cases"].good_cases(embedded_llm, max_tokens=6)
    return found


@pytest.fixture
def problem(modules: dict[str, ModuleType], base_url: str) -> Problem:
    """Makes the first visit of a kind, for one case or bad request; gives what was wrong."""
    port = urlsplit(base_url).port

    def visit_once(kind: str, request: Any) -> str | None:
        # The kind decides which of the two lists is used.
        visitor = modules["visitor"].Visitor(port, [request], [request], 0)
        visits = map(visitor.visit, itertools.count())
        found: str | None = asyncio.run(next(each for each in visits if each.kind == kind).run())
        return found

    return visit_once


@pytest.mark.slow
def test_hundreds_of_mixed_requests_leave_no_wrong_answer_and_nothing_behind(
    embedded_bundle: Path,
) -> None:
    # A minute is all warm-up for the allocator: what grows by less than a tenth is left to the
    # script's 10,000 requests.
    command = [sys.executable, str(SERVING / "soak.py"), str(embedded_bundle), "--json"]
    options = ["--requests", "400", "--warm-up", "0.5", "--max-growth", "0.1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert done.returncode == 0
    assert result["requests"] == 400
    assert result["kinds"].keys() == KINDS
    assert result["good answers compared"] == sum(
        result["kinds"][kind] for kind in ("whole", "streamed", "read slowly")
    )


@pytest.mark.parametrize("kind", ["whole", "streamed", "left in the middle"])
def test_a_soak_tells_a_wrong_answer_from_a_right_one(
    kind: str, cases: list[Any], problem: Problem
) -> None:
    case = next(case for case in cases if case.name == "greedy")
    assert problem(kind, case) is None

    (answer,) = case.answers
    other = dataclasses.replace(answer, text="?" + answer.text)
    found = problem(kind, dataclasses.replace(case, answers=(other,)))
    assert found is not None
    assert repr(other.text) in found


def test_a_client_that_leaves_in_the_middle_frees_its_slot_long_before_the_end(
    modules: dict[str, ModuleType], problem: Problem, embedded_llm: LLM
) -> None:
    # No answer may end by itself: its slot would be free whether its client left or not.
    bias = dict.fromkeys((4093, 4095), -100.0)
    beginning = embedded_llm.generate(
        "Hello", do_sample=False, max_new_tokens=200, logit_bias=bias
    ).text
    body = {"prompt": "Hello", "temperature": 0, "max_tokens": 1500, "logit_bias": bias}
    kinds = modules["cases"]
    answer = kinds.Answer(beginning, (), "length")
    # The client leaves after five events at most.
    case = kinds.Case("endless", kinds.COMPLETIONS, body, (answer,), 5)
    before = embedded_llm.stats().num_generated_tokens

    assert problem("left in the middle", case) is None

    deadline = time.monotonic() + 20
    while embedded_llm.stats().num_running:
        assert time.monotonic() < deadline, "the slot of a client that left is not free"
        time.sleep(0.02)
    assert 0 < embedded_llm.stats().num_generated_tokens - before < 1500


def test_a_soak_tells_when_a_bad_request_is_not_refused(
    modules: dict[str, ModuleType], problem: Problem
) -> None:
    for bad in modules["cases"].bad_requests(max_context=2048):
        assert problem("refused", bad) is None, bad.name
        found = problem("refused", dataclasses.replace(bad, status=418))
        assert found is not None
        assert f"must have status 418, has {bad.status}" in found


def test_tool_calls_are_part_of_what_a_soak_compares(cases: list[Any], problem: Problem) -> None:
    case = next(case for case in cases if case.name == "tools" and case.answers[0].calls)
    ((name, _),) = case.answers[0].calls
    assert name == "weather"
    for kind in ("whole", "streamed"):
        assert problem(kind, case) is None

        other = dataclasses.replace(case.answers[0], calls=((name, "{}"),))
        found = problem(kind, dataclasses.replace(case, answers=(other,)))
        assert found is not None
        assert "answered" in found


def test_memory_growth_leaves_out_the_warm_up_and_single_peaks(
    modules: dict[str, ModuleType],
) -> None:
    growth = modules["soak"].memory_growth
    warming = [50.0, 80.0]
    assert growth([*warming, *[100.0] * 18], 0.2) == 0
    assert growth([*warming, *[100.0] * 16, 110.0, 110.0], 0.2) == pytest.approx(0.1)
    assert growth([*warming, *[100.0] * 27, 900.0], 0.2) == 0
