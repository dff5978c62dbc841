"""What is counted, and how it is written down."""

from __future__ import annotations

import itertools

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from qwen_runtime.engine import EngineStats
from qwen_runtime.server.metrics import Metrics

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_slots_used=5,
    max_running=16,
    max_waiting=256,
    cache_tokens_used=64,
    cache_tokens_limit=256,
    num_prompt_tokens=100,
    num_cached_tokens=40,
    num_generated_tokens=7,
    num_steps=9,
)


def values(metrics: Metrics, *, name: str = "tiny") -> dict[str, float]:
    """Samples by name that carry the model's name and nothing else."""
    document = metrics.render("")[0].decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(document)
        for sample in family.samples
        if sample.labels == {"model_name": name}
    }


def finished(metrics: Metrics) -> dict[str, float]:
    document = metrics.render("")[0].decode()
    return {
        sample.labels["finished_reason"]: sample.value
        for family in text_string_to_metric_families(document)
        for sample in family.samples
        if sample.name == "qwen:request_success_total"
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds to add to the clock; each reading takes the next."""
    steps: list[float] = []
    total = itertools.accumulate(iter(lambda: steps.pop(0), None))
    monkeypatch.setattr("qwen_runtime.server.metrics.time.perf_counter", lambda: next(total))
    return steps


def test_the_engine_is_read_at_every_scrape() -> None:
    current = STATS
    metrics = Metrics("tiny", lambda: current)
    shown = values(metrics)
    assert shown["qwen:num_requests_running"] == 3
    assert shown["qwen:num_requests_waiting"] == 2
    assert shown["qwen:num_requests_running_limit"] == 16
    assert shown["qwen:num_requests_waiting_limit"] == 256
    assert shown["qwen:num_cache_slots_used"] == 5
    assert shown["qwen:kv_cache_usage_perc"] == 0.25
    assert shown["qwen:prompt_tokens_total"] == 100
    assert shown["qwen:prefix_cache_hits_total"] == 40
    assert shown["qwen:generation_tokens_total"] == 7
    assert shown["qwen:engine_steps_total"] == 9
    current = EngineStats(0, 0, 0, 16, 256, 0, 0, 200, 80, 14, 18)
    shown = values(metrics)
    assert shown["qwen:num_requests_running"] == 0
    assert shown["qwen:kv_cache_usage_perc"] == 0
    assert shown["qwen:generation_tokens_total"] == 14


def test_there_are_no_engine_figures_before_there_is_an_engine() -> None:
    assert "qwen:num_requests_running" not in values(Metrics("tiny", lambda: None))


def test_a_sequence_is_timed_from_token_to_token(clock: list[float]) -> None:
    metrics = Metrics("tiny", lambda: None)
    clock += [10.0, 0.5, 0.25, 0.75, 1.0]  # taken, first token, one more, three more, the end
    track = metrics.track()
    for count in (1, 1, 0, 3):
        track.tokens(count)
    track.finish("stop", prompt_tokens=12)
    track.finish("cancelled", prompt_tokens=12)
    shown = values(metrics)
    assert shown["qwen:time_to_first_token_seconds_sum"] == 0.5
    assert shown["qwen:time_to_first_token_seconds_count"] == 1
    assert shown["qwen:inter_token_latency_seconds_sum"] == 1.0
    assert shown["qwen:inter_token_latency_seconds_count"] == 4
    assert shown["qwen:e2e_request_latency_seconds_sum"] == 2.5
    assert shown["qwen:request_prompt_tokens_sum"] == 12
    assert shown["qwen:request_generation_tokens_sum"] == 5
    assert finished(metrics) == {"stop": 1}


def test_a_sequence_without_a_token_has_no_time_to_its_first() -> None:
    metrics = Metrics("tiny", lambda: None)
    metrics.track().finish("cancelled", prompt_tokens=3)
    assert values(metrics)["qwen:time_to_first_token_seconds_count"] == 0
    assert finished(metrics) == {"cancelled": 1}


def test_two_apps_in_a_process_count_apart() -> None:
    first, second = Metrics("one", lambda: STATS), Metrics("two", lambda: STATS)
    first.track().finish("length", prompt_tokens=1)
    first.responded(200)
    assert finished(first) == {"length": 1}
    assert finished(second) == {}
    assert 'qwen:http_responses_total{status="200"} 1.0' in first.render("")[0].decode()
    assert "qwen:num_requests_running" in values(second, name="two")


def test_a_scraper_may_ask_for_openmetrics() -> None:
    metrics = Metrics('a "name"', lambda: STATS)
    document, kind = metrics.render("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    families = {family.name for family in parse_openmetrics(document.decode())}
    assert families & {"qwen:kv_cache_usage_perc", "qwen_kv_cache_usage_perc"}
    assert metrics.render("")[1].startswith("text/plain")
