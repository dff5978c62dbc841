"""`bench`: what is measured, and what is made of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_runtime import LLM
from qwen_runtime.bench import BenchOptions, BenchResult, LengthResult, Run, bench, render, table
from qwen_runtime.bench.environment import OtherWork, peak_memory_bytes
from qwen_runtime.bench.measure import measure
from qwen_runtime.bench.prompts import random_prompts
from qwen_runtime.bench.streamed import StreamedBytes
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.errors import CapacityError, RequestError

GB = 1e9


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_runtime.bench.benchmark.read_bandwidth", lambda threads: 10 * GB)


@pytest.fixture(scope="module")
def result(embedded_bundle: Path) -> BenchResult:
    options = BenchOptions((24, 9), new_tokens=5, repeat=2, threads=1, seed=3)
    return bench(Bundle.open(embedded_bundle), options)


def test_every_length_has_its_runs_and_every_run_its_tokens(result: BenchResult) -> None:
    assert [length.prompt_tokens for length in result.lengths] == [9, 24]
    for length in result.lengths:
        assert [len(run.arrivals_ms) for run in length.runs] == [5, 5]
        assert all(time > 0 for run in length.runs for time in run.between_ms)


def test_the_model_takes_most_of_a_run_and_never_more_than_all(result: BenchResult) -> None:
    for length in result.lengths:
        for run in length.runs:
            assert 0 < run.prefill_model_ms < run.ttft_ms
            assert 0 < run.decode_model_ms < run.decode_ms
        assert length.host_per_token_ms < length.between_tokens_ms.mean


def test_the_command_repeats_what_was_run(result: BenchResult, embedded_bundle: Path) -> None:
    assert result.command == (
        f"qwen-run bench {embedded_bundle} --prompt-tokens 9 --prompt-tokens 24 --new-tokens 5 "
        "--batch 1 --repeat 2 --threads 1 --seed 3"
    )


def test_a_command_holds_elsewhere_and_names_its_threads(
    embedded_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(embedded_bundle.parent)
    settings = BenchOptions(prompt_tokens=(8,), new_tokens=2, repeat=1)
    result = bench(Bundle.open(Path(embedded_bundle.name)), settings)
    words = result.command.split()
    assert Path(words[2]).is_absolute()
    assert words[words.index("--threads") + 1] == str(result.environment.threads)


def test_a_result_names_bundle_and_machine(result: BenchResult, embedded_bundle: Path) -> None:
    assert result.bundle.manifest_sha256 == sha256_of(embedded_bundle / "manifest.json")
    assert result.bundle.weights_bytes == (embedded_bundle / "weights.bin").stat().st_size
    assert (result.bundle.precision, result.bundle.parity) == ("fp32", "not_verified")
    assert result.environment.threads == 1
    assert result.environment.versions["numpy"] == np.__version__
    assert any("was not verified" in warning for warning in result.warnings)
    assert result.load_s > 0


def test_a_result_names_the_graph_that_ran(tmp_path: Path, result: BenchResult) -> None:
    assert result.bundle.graph == "prefill.onnx"
    made = build(
        small_checkpoint(tmp_path / "model"), tmp_path / "out", BuildOptions("int4", verify=False)
    )
    settings = BenchOptions((8,), new_tokens=2, repeat=1)
    for graph in ("lowered/cpu/prefill.onnx", "prefill.onnx"):
        measured = bench(made, settings)
        assert measured.bundle.graph == graph
        assert f"graph {graph}, parity" in " ".join(table(measured).split())
        shutil.rmtree(made.path / "lowered", ignore_errors=True)


def test_a_result_goes_through_json_unchanged(result: BenchResult) -> None:
    document = json.loads(json.dumps(result.document()))
    assert document["schema_version"] == 1
    assert document["lengths"][1]["between_tokens_ms"]["p99"] == (
        result.lengths[1].between_tokens_ms.p99
    )
    assert len(document["lengths"][0]["runs"][0]["arrivals_ms"]) == 5


def test_lengths_are_exact_where_the_bundle_would_end_or_change_tokens(
    embedded_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embedded_llm.generate(
        list(range(300, 310)), do_sample=False, max_new_tokens=1, repetition_penalty=1.0
    )
    settings = dataclasses.replace(
        embedded_llm.generation_config,
        eos_token_id=first.token_ids[0],
        do_sample=True,
        temperature=2.0,
        no_repeat_ngram_size=2,
        suppress_tokens=first.token_ids,
    )
    monkeypatch.setattr(embedded_llm, "generation_config", settings)
    run = measure(embedded_llm, np.arange(300, 310)[None], 6)
    assert len(run.arrivals_ms) == 6


def test_rows_of_a_batch_arrive_together(embedded_llm: LLM) -> None:
    prompts = random_prompts(embedded_llm, (0,), 3, 7)
    run = measure(embedded_llm, prompts, 4)
    assert len(run.arrivals_ms) == 4
    assert list(run.arrivals_ms) == sorted(run.arrivals_ms)


def test_a_bundle_without_a_tokenizer_is_measured(golden_bundle: Callable[[str], Path]) -> None:
    options = BenchOptions((4,), new_tokens=3, repeat=1)
    found = bench(Bundle.open(golden_bundle("qwen2_tied")), options)
    assert len(found.lengths[0].runs[0].arrivals_ms) == 3


def test_time_in_the_model_and_around_it_are_told_apart(
    embedded_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = embedded_llm._engine.model._runner
    slow_calls = {"prefill": 0.04, "decode": 0.02}
    for name, seconds in slow_calls.items():
        monkeypatch.setattr(runner, name, _delayed(getattr(runner, name), seconds), raising=True)
    slow = measure(embedded_llm, np.arange(300, 310)[None], 4)
    assert slow.prefill_model_ms >= 40
    assert slow.decode_model_ms >= 3 * 20
    detokenizer = "qwen_runtime.text.IncrementalDetokenizer.push"
    monkeypatch.setattr(detokenizer, _delayed_push(0.03))
    slower = measure(embedded_llm, np.arange(300, 310)[None], 4)
    assert slower.host_ms >= 30 > slow.host_ms
    assert embedded_llm._engine.model._runner is runner


def test_prompts_can_be_drawn_again_and_differ_between_runs(embedded_llm: LLM) -> None:
    drawn = random_prompts(embedded_llm, (0, 8, 1), 2, 8)
    np.testing.assert_array_equal(drawn, random_prompts(embedded_llm, (0, 8, 1), 2, 8))
    for other in ((0, 8, 2), (1, 8, 1)):
        assert (drawn != random_prompts(embedded_llm, other, 2, 8)).any()
    assert (drawn[0] != drawn[1]).any()


def test_prompts_hold_no_special_tokens(embedded_llm: LLM) -> None:
    assert embedded_llm.tokenizer is not None
    drawn = set(random_prompts(embedded_llm, (0,), 1, 100_000)[0].tolist())
    assert not drawn & embedded_llm.tokenizer.special_ids
    assert max(drawn) < embedded_llm.tokenizer.vocab_size
    assert len(drawn) == embedded_llm.tokenizer.vocab_size - len(
        embedded_llm.tokenizer.special_ids
    )


def _runs() -> tuple[Run, ...]:
    """Tokens after 100 ms, then every 10 or every 20; model calls leave 1 and 2 ms a token."""
    return (
        Run((100.0, 110.0, 120.0, 130.0), 96.0, 27.0),
        Run((104.0, 124.0, 144.0, 164.0), 96.0, 54.0),
        Run((102.0, 112.0, 122.0, 132.0), 96.0, 27.0),
    )


def _length(**changes: Any) -> LengthResult:
    streamed = StreamedBytes(80_000_000, 1_000_000)
    arguments: dict[str, Any] = {"batch": 2, "streamed": streamed, "bandwidth": 20e9}
    return LengthResult.of(51, _runs(), **arguments | changes)


def test_figures_follow_from_the_runs() -> None:
    found = _length()
    assert found.ttft_ms == 102
    assert found.prefill_tokens_per_s == pytest.approx(2 * 51 / 0.102)
    assert found.between_tokens_ms.p50 == 10
    assert found.between_tokens_ms.p99 == found.between_tokens_ms.max == 20
    assert found.between_tokens_ms.mean == pytest.approx(40 / 3)
    assert found.decode_tokens_per_s == pytest.approx(2 * 3 / 0.030)
    assert found.host_per_token_ms == pytest.approx(1)
    assert found.host_before_first_ms == pytest.approx(6)


def test_the_share_of_bandwidth_counts_weights_once_and_every_rows_cache() -> None:
    found = _length()
    assert found.mean_cache_tokens == 53  # 52, 53 and 54 tokens in three steps
    assert found.bytes_per_token == (80e6 + 2 * 53e6) / 2
    assert found.bytes_per_s == pytest.approx(186e6 / 0.010)
    assert found.bandwidth_share == pytest.approx(186e6 / 0.010 / 20e9)
    assert _length(bandwidth=40e9).bandwidth_share == pytest.approx(found.bandwidth_share / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": (0,)}, "prompt_tokens must be an integer >= 1, got 0"),
        ({"prompt_tokens": (True,)}, "prompt_tokens must be an integer >= 1, got True"),
        ({"prompt_tokens": (8, 8)}, "prompt_tokens must differ"),
        ({"new_tokens": 1}, "new_tokens must be an integer >= 2, got 1"),
        ({"batch": 0}, "batch must be an integer >= 1, got 0"),
        ({"repeat": 1.5}, "repeat must be an integer >= 1, got 1.5"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"threads": float("nan")}, "threads must be an integer >= 1, got nan"),
    ],
)
def test_counts_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        BenchOptions(**settings)
    assert caught.value.param == next(iter(settings))


def test_default_lengths_are_those_that_fit() -> None:
    options = BenchOptions(new_tokens=32)
    assert options.lengths(4096) == (32, 128, 512, 1024)
    assert options.lengths(128 + 31) == (32, 128)
    assert options.lengths(128 + 30) == (32,)


def test_the_longest_prompt_that_fits_is_run_and_one_more_refused(
    golden_bundle: Callable[[str], Path],
) -> None:
    bundle = Bundle.open(golden_bundle("qwen2_tied"))
    longest = bundle.manifest.max_context + 1 - 3
    found = bench(bundle, BenchOptions((longest,), new_tokens=3, repeat=1))
    assert found.lengths[0].prompt_tokens == longest
    with pytest.raises(CapacityError, match=f"prompt_tokens must be at most {longest}") as caught:
        bench(bundle, BenchOptions((4, longest + 1), new_tokens=3))
    assert caught.value.param == "prompt_tokens"


def test_a_bundle_too_short_for_every_default_is_refused() -> None:
    with pytest.raises(CapacityError, match="at most 31 so that 32 new tokens fit"):
        BenchOptions(new_tokens=32).lengths(62)


def test_another_engine_opens_the_bundle_with_the_threads_asked_for(
    embedded_bundle: Path,
) -> None:
    opened = []

    def open_llm(bundle: Bundle, threads: int | None) -> LLM:
        opened.append((bundle, threads))
        return LLM(bundle, threads=threads)

    bundle = Bundle.open(embedded_bundle)
    seen: list[tuple[str, int, int]] = []
    options = BenchOptions((4, 5), new_tokens=2, repeat=1, threads=1)
    bench(bundle, options, open_llm=open_llm, progress=lambda *step: seen.append(step))
    assert opened == [(bundle, 1)]
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1] == ("Measuring", 4, 4)


def test_other_work_is_all_that_is_busy_without_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(5.0, 100.0, 1.0), (9.0, 107.0, 2.0)])
    clock = "qwen_runtime.bench.environment._clock_readings"
    monkeypatch.setattr(clock, lambda: next(readings))
    assert OtherWork().cores() == (7 - 1) / 4
    monkeypatch.setattr(clock, lambda: None)
    assert OtherWork().cores() is None


def test_a_busy_machine_is_one_with_a_tenth_of_its_cpus_taken() -> None:
    tenth = (os.cpu_count() or 1) / 10
    assert OtherWork.is_much(1.01 * tenth)
    assert not OtherWork.is_much(0.99 * tenth)


def test_peak_memory_is_at_least_what_numpy_takes() -> None:
    peak = peak_memory_bytes()
    assert peak is None or peak > 10e6


def test_the_table_holds_every_figure_in_its_unit(result: BenchResult) -> None:
    known = dataclasses.replace(result, lengths=(_length(),), streamed=StreamedBytes(1, 1))
    lines = table(known).splitlines()
    row = next(line for line in lines if line.lstrip().startswith("51"))
    assert " ".join(row.split()) == "51 102 1,000 10.0 20.0 200 1.00 93.0 18.6 93"
    assert f"Repeat: {result.command}" in lines
    empty = [index for index, line in enumerate(lines) if not line]
    grid = lines[empty[0] + 1 : empty[1]]
    assert len({len(line) for line in grid}) == 1
    assert len(grid[0]) <= 80


@pytest.mark.parametrize("lengths", [1, 2])
def test_the_page_stands_alone_and_its_drawings_are_sound(
    result: BenchResult, lengths: int
) -> None:
    page = render(dataclasses.replace(result, lengths=result.lengths[:lengths]))
    drawings = list(_drawings(page))
    assert len(drawings) == 2
    for drawing in drawings:
        assert drawing.get("role") == "img"
        assert drawing.get("aria-label")
        texts = [text.text or "" for text in drawing.iter("text")]
        assert any("tokens" in text and "logarithmic" in text for text in texts)
        assert any("per" in text for text in texts)
        for circle in drawing.iter("circle"):
            assert 72 <= float(circle.get("cx", "nan")) <= 936
            assert 28 <= float(circle.get("cy", "nan")) <= 310
    assert "<script" not in page
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page


def test_a_hiccup_leaves_the_drawing_and_says_how_long_it_was(result: BenchResult) -> None:
    between = dataclasses.replace(_length().between_tokens_ms, p99=700.0)
    hiccup = dataclasses.replace(_length(), between_tokens_ms=between)
    page = render(dataclasses.replace(result, lengths=(hiccup,)))
    assert "p99 700 ms</text>" in page


def test_a_source_with_markup_is_shown_as_text(result: BenchResult) -> None:
    bundle = dataclasses.replace(result.bundle, source="<b>&")
    page = render(dataclasses.replace(result, bundle=bundle))
    assert "<h1>Speed of &lt;b&gt;&amp;, fp32</h1>" in page


def _drawings(page: str) -> Iterator[ET.Element]:
    for part in page.split("<svg")[1:]:
        yield ET.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")


def _delayed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        time.sleep(seconds)
        return function(*args)

    return call


def _delayed_push(seconds: float) -> Callable[..., str]:
    def push(self: object, ids: list[int]) -> str:
        time.sleep(seconds)
        return ""

    return push
