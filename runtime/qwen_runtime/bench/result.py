"""What a benchmark found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Self

import numpy as np

from qwen_runtime.bench.environment import Environment
from qwen_runtime.bench.options import BenchOptions
from qwen_runtime.bench.streamed import StreamedBytes

__all__ = ["SCHEMA_VERSION", "BenchResult", "BundleFacts", "LengthResult", "Percentiles", "Run"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A sample of times, in milliseconds."""

    p50: float
    p99: float
    mean: float
    max: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Self:
        """Summarise at least one time; percentiles are interpolated linearly."""
        p50, p99 = np.percentile(milliseconds, (50, 99))
        return cls(float(p50), float(p99), float(np.mean(milliseconds)), max(milliseconds))


@dataclass(frozen=True, slots=True)
class Run:
    """One request, as its reader saw it. Times in milliseconds."""

    arrivals_ms: tuple[float, ...]
    """When every row's next token had arrived, since the request was made."""
    prefill_model_ms: float
    """Time inside model calls before the first token."""
    decode_model_ms: float
    """Time inside model calls after it."""

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return self.arrivals_ms[0]

    @property
    def between_ms(self) -> list[float]:
        """Time from each token to the next."""
        return [later - earlier for earlier, later in pairwise(self.arrivals_ms)]

    @property
    def decode_ms(self) -> float:
        """Time from the first token to the last."""
        return self.arrivals_ms[-1] - self.arrivals_ms[0]

    @property
    def host_ms(self) -> float:
        """Time outside the model, of each token after the first."""
        return (self.decode_ms - self.decode_model_ms) / (len(self.arrivals_ms) - 1)


@dataclass(frozen=True, slots=True)
class LengthResult:
    """All runs of one prompt length. Speeds count the tokens of all rows."""

    prompt_tokens: int
    ttft_ms: float
    """Time to first token: median of the runs."""
    prefill_tokens_per_s: float
    """Prompt tokens over the time to first token."""
    between_tokens_ms: Percentiles
    """Time between tokens, every one of every run."""
    decode_tokens_per_s: float
    """Tokens after the first over their time: median of the runs."""
    host_before_first_ms: float
    """Part of the time to first token that is spent outside the model: median of the runs."""
    host_per_token_ms: float
    """The same of every later token."""
    mean_cache_tokens: float
    """Tokens in a row's cache, averaged over the steps."""
    bytes_per_token: float
    """Bytes a step reads at that length, over its rows."""
    bytes_per_s: float
    """Bytes a step reads, over the median time between tokens."""
    bandwidth_share: float
    """The same over the measured read bandwidth; above 1 where caches serve a small model."""
    runs: tuple[Run, ...]

    @classmethod
    def of(
        cls,
        prompt_tokens: int,
        runs: Sequence[Run],
        *,
        batch: int,
        streamed: StreamedBytes,
        bandwidth: float,
    ) -> Self:
        """Work out the figures of at least one run.

        Args:
            prompt_tokens: Length of every row's prompt.
            runs: With equally many new tokens, at least two.
            batch: Rows of a run.
            streamed: What a step reads.
            bandwidth: Read bandwidth of the machine, bytes/s.
        """
        steps = len(runs[0].arrivals_ms) - 1
        between = Percentiles.of([time for run in runs for time in run.between_ms])
        ttft = median(run.ttft_ms for run in runs)
        length = prompt_tokens + (steps - 1) / 2 + 1  # the step's own token included
        step_bytes = streamed.step(batch, length)
        return cls(
            prompt_tokens=prompt_tokens,
            ttft_ms=ttft,
            prefill_tokens_per_s=1e3 * batch * prompt_tokens / ttft,
            between_tokens_ms=between,
            decode_tokens_per_s=median(1e3 * batch * steps / run.decode_ms for run in runs),
            host_before_first_ms=median(run.ttft_ms - run.prefill_model_ms for run in runs),
            host_per_token_ms=median(run.host_ms for run in runs),
            mean_cache_tokens=length,
            bytes_per_token=step_bytes / batch,
            bytes_per_s=1e3 * step_bytes / between.p50,
            bandwidth_share=1e3 * step_bytes / between.p50 / bandwidth,
            runs=tuple(runs),
        )


@dataclass(frozen=True, slots=True)
class BundleFacts:
    """Which bundle was measured."""

    path: str
    source: str
    """Its checkpoint's name."""
    revision: str | None
    precision: str
    compute_dtype: str
    parity: str
    """Whether it answered like its checkpoint when it was built."""
    manifest_sha256: str
    """Stands for the whole bundle: the manifest holds the hash of every core file."""
    weights_bytes: int
    graph: str | None
    """Its file that prompts ran on: the portable graph, or the one for the CPU; None where the
    engine names none."""


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A benchmark: what was measured, where, and the figures."""

    command: str
    """Repeats it."""
    bundle: BundleFacts
    options: BenchOptions
    """As they were run: with every prompt length."""
    environment: Environment
    load_s: float
    """Time to open the bundle and load it into the engine."""
    peak_memory_bytes: int | None
    """Most resident memory up to the end of the runs."""
    streamed: StreamedBytes
    read_bandwidth: float
    """What this machine reads from memory with as many threads, bytes/s; measured after the runs."""
    other_cores: float | None
    """CPUs that other processes kept busy during the runs, on average."""
    warnings: tuple[str, ...]
    """Why figures may not be what they seem; a sentence each."""
    lengths: tuple[LengthResult, ...]
    """By prompt length, ascending."""

    def document(self) -> dict[str, Any]:
        """Everything, raw times included, as JSON can hold it."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}
