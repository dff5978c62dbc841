"""What a server counts, in Prometheus' text format under names like vLLM's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from qwen_runtime.engine import EngineStats

__all__ = ["Metrics", "RequestMetrics"]

# A prompt of a small model is read in milliseconds, a long one of a large model in minutes.
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0),
)
_INTER_TOKEN_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0),
)
_REQUEST_SECONDS = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0),
    *(120.0, 300.0, 600.0, 1800.0),
)
_TOKENS = tuple(float(2**power) for power in range(18))


class Metrics:
    """The counters of one app, in a registry of its own: two apps in a process do not clash.

    Args:
        model_name: Label of everything that is counted.
        stats: Reads the engine at every scrape; None while the model is being loaded.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]) -> None:
        self.registry = CollectorRegistry()
        """Where an embedding service may add its own."""

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"qwen:{name}", text, ("model_name",), registry=self.registry, buckets=buckets
            )
            return made.labels(model_name)

        self._first_token = histogram(
            "time_to_first_token_seconds",
            "Seconds from taking a request to its first token.",
            _FIRST_TOKEN_SECONDS,
        )
        self._inter_token = histogram(
            "inter_token_latency_seconds",
            "Seconds between two tokens of a sequence.",
            _INTER_TOKEN_SECONDS,
        )
        self._latency = histogram(
            "e2e_request_latency_seconds",
            "Seconds from taking a request to its end.",
            _REQUEST_SECONDS,
        )
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = histogram(
            "request_generation_tokens", "Tokens generated for a sequence.", _TOKENS
        )
        self._finished = Counter(
            "qwen:request_success",
            "Sequences that ended, by reason.",
            labelnames=("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._responses = Counter(
            "qwen:http_responses",
            "HTTP responses, by status.",
            labelnames=("status",),
            registry=self.registry,
        )
        self._model_name = model_name
        self.registry.register(_EngineCollector(model_name, stats))
        ProcessCollector(registry=self.registry)

    def track(self) -> RequestMetrics:
        """Begin the clock of one sequence; a request for several begins one for each."""
        return RequestMetrics(self)

    def responded(self, status: int) -> None:
        """Count an HTTP response."""
        self._responses.labels(str(status)).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Write everything as it is now.

        Args:
            accept: The request's Accept header: plain Prometheus text, or OpenMetrics.

        Returns:
            The document and its content type.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _observe_tokens(self, count: int, seconds: float, *, first: bool) -> None:
        if first:
            self._first_token.observe(seconds)
        else:
            for _ in range(count):
                self._inter_token.observe(seconds / count)

    def _observe_end(self, reason: str, seconds: float, prompt: int, generated: int) -> None:
        self._finished.labels(self._model_name, reason).inc()
        self._latency.observe(seconds)
        self._prompt.observe(prompt)
        self._generated.observe(generated)


class RequestMetrics:
    """The clock of one sequence. Made by `Metrics.track` when its request is taken."""

    __slots__ = ("_began", "_ended", "_generated", "_last", "_metrics")

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = self._last = time.perf_counter()
        self._generated = 0
        self._ended = False

    def tokens(self, count: int) -> None:
        """Tell that tokens have come.

        Args:
            count: How many since the last call; several share the time evenly. 0 is nothing.
        """
        if count < 1:
            return
        now = time.perf_counter()
        self._metrics._observe_tokens(count, now - self._last, first=self._generated == 0)
        self._last = now
        self._generated += count

    def finish(self, reason: str, *, prompt_tokens: int) -> None:
        """Tell that the sequence has ended; only the first call counts.

        Args:
            reason: "stop", "length", "tool_calls", "cancelled" or "error".
            prompt_tokens: Length of its prompt.
        """
        if self._ended:
            return
        self._ended = True
        seconds = time.perf_counter() - self._began
        self._metrics._observe_end(reason, seconds, prompt_tokens, self._generated)


class _EngineCollector(Collector):
    """Reads the engine when it is asked, so that a gauge is never older than its scrape."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's gauges and totals; nothing while there is no engine."""
        stats = self._stats()
        if stats is None:
            return
        limit = stats.cache_tokens_limit
        gauges = {
            "num_requests_running": ("Sequences that are being generated.", stats.num_running),
            "num_requests_waiting": ("Sequences in the queue.", stats.num_waiting),
            "num_requests_running_limit": ("Sequences at once, at most.", stats.max_running),
            "num_requests_waiting_limit": ("Queued sequences at most.", stats.max_waiting),
            "num_cache_slots_used": ("Cache rows that hold tokens.", stats.num_slots_used),
            "kv_cache_usage_perc": (
                "Share of the key-value cache in use; 1 is all of it.",
                stats.cache_tokens_used / limit if limit else 0.0,
            ),
        }
        totals = {
            "prompt_tokens": ("Prompt tokens of all requests.", stats.num_prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.num_generated_tokens),
            "prefix_cache_hits": ("Prompt tokens found in the cache.", stats.num_cached_tokens),
            "engine_steps": ("Calls of the model.", stats.num_steps),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"qwen:{name}", text, labels=("model_name",))
            gauge.add_metric((self._model_name,), value)
            yield gauge
        for name, (text, value) in totals.items():
            total = CounterMetricFamily(f"qwen:{name}", text, labels=("model_name",))
            total.add_metric((self._model_name,), value)
            yield total
