"""`bench`: warm up, run, and put the figures beside what the machine can do."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable

from qwen_runtime.bandwidth import read_bandwidth
from qwen_runtime.bench.environment import Environment, OtherWork, peak_memory_bytes
from qwen_runtime.bench.measure import measure
from qwen_runtime.bench.model_clock import graph_of
from qwen_runtime.bench.options import BenchOptions
from qwen_runtime.bench.prompts import random_prompts
from qwen_runtime.bench.result import BenchResult, BundleFacts, LengthResult, Run
from qwen_runtime.bench.streamed import StreamedBytes
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.llm import LLM
from qwen_runtime.manifest import MANIFEST_FILE

__all__ = ["bench"]

Progress = Callable[[str, int, int], None]
"""Called with the step's name, the runs done and their total."""
OpenLLM = Callable[[Bundle, int | None], LLM]
"""Loads a bundle with so many threads."""


def _open_on_cpu(bundle: Bundle, threads: int | None) -> LLM:
    # Random prompts are never asked twice: keeping them would only take memory.
    return LLM(bundle, threads=threads, prefix_cache_slots=0)


def bench(
    bundle: Bundle,
    options: BenchOptions | None = None,
    *,
    open_llm: OpenLLM = _open_on_cpu,
    progress: Progress = lambda *_: None,
) -> BenchResult:
    """Measure how fast a bundle answers on this machine.

    Every length is run once without counting, then as often as asked, each time with another
    prompt so that nothing can be reused. Of the read bandwidth the best of a few passes counts;
    it is measured after the runs, so that its array is not part of their peak memory.

    Args:
        bundle: The bundle; it is not written to.
        options: What to measure; None for the defaults.
        open_llm: Loads it, for an engine other than ONNX Runtime on the CPU.
        progress: Called as the work goes on.

    Raises:
        CapacityError: If a prompt and its new tokens do not fit the bundle, or the rows not the
            memory.
        BackendError: If the engine is missing or fails.
        BundleError: If a file of the bundle cannot be read.
    """
    options = options or BenchOptions()
    lengths = options.lengths(bundle.manifest.max_context)
    options = dataclasses.replace(options, prompt_tokens=lengths)
    streamed = StreamedBytes.of(bundle)
    environment = Environment.read(options.threads)
    started = time.perf_counter()
    with open_llm(bundle, options.threads) as llm:
        load_s = time.perf_counter() - started
        graph = graph_of(llm)
        others = OtherWork()
        runs = {length: _runs(llm, options, length, progress) for length in lengths}
        other_cores = others.cores()
    peak = peak_memory_bytes()
    bandwidth = read_bandwidth(environment.threads)
    return BenchResult(
        command=_command(bundle, options, environment.threads),
        bundle=_facts(bundle, graph),
        options=options,
        environment=environment,
        load_s=load_s,
        peak_memory_bytes=peak,
        streamed=streamed,
        read_bandwidth=bandwidth,
        other_cores=other_cores,
        warnings=tuple(_warnings(bundle, environment, streamed, other_cores)),
        lengths=tuple(
            LengthResult.of(
                length, runs[length], batch=options.batch, streamed=streamed, bandwidth=bandwidth
            )
            for length in lengths
        ),
    )


def _runs(llm: LLM, options: BenchOptions, length: int, progress: Progress) -> list[Run]:
    total = len(options.prompt_tokens) * (1 + options.repeat)
    done = options.prompt_tokens.index(length) * (1 + options.repeat)
    runs = []
    for run in range(1 + options.repeat):
        progress("Measuring", done + run, total)
        prompts = random_prompts(llm, (options.seed, length, run), options.batch, length)
        runs.append(measure(llm, prompts, options.new_tokens))
    progress("Measuring", done + 1 + options.repeat, total)
    return runs[1:]  # the first warmed up caches, buffers and the engine's plans


def _facts(bundle: Bundle, graph: str | None) -> BundleFacts:
    manifest = bundle.manifest
    return BundleFacts(
        path=str(bundle.path),
        source=manifest.source,
        revision=manifest.revision,
        precision=manifest.precision,
        compute_dtype=manifest.compute_dtype,
        parity=manifest.parity.status,
        manifest_sha256=sha256_of(bundle.path / MANIFEST_FILE),
        weights_bytes=manifest.files[manifest.weights.file].num_bytes,
        graph=graph,
    )


def _command(bundle: Bundle, options: BenchOptions, threads: int) -> str:
    """The command line that runs the same again from any folder, defaults spelled out."""
    words = ["qwen-run", "bench", str(bundle.path.absolute())]
    for length in options.prompt_tokens:
        words += ["--prompt-tokens", str(length)]
    settings = {
        "new-tokens": options.new_tokens,
        "batch": options.batch,
        "repeat": options.repeat,
        "threads": threads,
        "seed": options.seed,
    }
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    return shlex.join(words)


def _warnings(
    bundle: Bundle, environment: Environment, streamed: StreamedBytes, other_cores: float | None
) -> list[str]:
    warnings = []
    if other_cores is not None and OtherWork.is_much(other_cores):
        warnings.append(
            f"other processes kept {other_cores:.1f} CPUs busy during the runs: measure again on "
            "a quiet machine"
        )
    if environment.threads > environment.cores:
        warnings.append(
            f"{environment.threads} threads share {environment.cores} cores: use at most as many "
            "threads"
        )
    if streamed.weights < environment.cache_bytes:
        warnings.append(
            f"the {streamed.weights / 1e6:.0f} MB that a step reads fit the processor's caches: "
            "its share of the memory bandwidth says little"
        )
    if bundle.manifest.parity.status != "passed":
        warnings.append(
            "the bundle was not verified when it was built: whether it answers like its "
            "checkpoint is not known"
        )
    return warnings
