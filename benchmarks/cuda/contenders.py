"""What runs a work on the GPU: ours, transformers and onnxruntime-genai, one after the other."""

from __future__ import annotations

import functools
import gc
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from workload import Measured, Work

__all__ = ["CONTENDERS", "available", "device_facts"]

WARM_UP = 8
_TORCH = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

_GREEDY: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
_SAMPLED: dict[str, Any] = {
    "do_sample": True,
    "seed": 0,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
}

Contender = Callable[[Work, Path, Path], Measured]
"""Runs a work from a checkpoint, keeping what it builds in a folder."""


def available() -> dict[str, str | None]:
    """Why a contender cannot run, by its name; None where it can."""
    needs = {
        "ours": ("onnxruntime", "cuda.bindings"),
        "transformers eager": ("torch", "transformers"),
        "transformers compiled": ("torch", "transformers"),
        "onnxruntime-genai": ("onnxruntime_genai",),
    }
    return {name: _missing(modules) for name, modules in needs.items()}


def device_facts() -> dict[str, object]:
    """The GPU, its driver and its memory, as the driver reports them.

    Raises:
        SystemExit: If there is no driver.
    """
    query = "name,driver_version,memory.total,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            "an NVIDIA GPU and its driver must be there to measure; nvidia-smi could not be run: "
            f"{error}. --dry-run shows what would be measured"
        ) from error
    values = line.splitlines()[0].split(", ")
    return dict(zip(("gpu", "driver", "gpu_memory", "compute_capability"), values, strict=True))


def _missing(modules: tuple[str, ...]) -> str | None:
    for module in modules:
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"{module} is not installed"
    return None


def _used_mb() -> float:
    from cuda.bindings import runtime

    error, free, total = runtime.cudaMemGetInfo()
    if int(error):
        raise RuntimeError(f"cudaMemGetInfo failed with {error}")
    return float(total - free) / 1e6


def _ids(vocab_size: int, rows: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length))


def _ours(work: Work, checkpoint: Path, folder: Path) -> Measured:
    from qwen_export.bundle import BuildOptions, build
    from qwen_export.lowering import LoweringOptions, lower_bundle
    from qwen_runtime.backends.registry import open_runner
    from qwen_runtime.bundle import Bundle
    from qwen_runtime.lowered_file import lowered_names

    path = folder / f"{checkpoint.name}-{work.precision}-{work.compute_dtype}"
    if not path.exists():
        precision = work.precision if work.precision.startswith("int") else "fp32"
        build(checkpoint, path, BuildOptions(precision=precision, max_context=4096, verify=False))
    bundle = Bundle.open(path)
    if "cuda" not in lowered_names(path):
        lower_bundle(bundle, "cuda", LoweringOptions(_any(work.compute_dtype)))
    before, vocab = _used_mb(), bundle.manifest.model.vocab_size
    # Random weights have no reference to be proved with.
    with closing(open_runner(bundle, device="cuda", proved=False)) as runner:
        slots = range(work.batch)
        runner.allocate(work.batch, work.past + work.steps + WARM_UP)
        for slot, row in enumerate(_ids(vocab, work.batch, work.past)):
            runner.prefill([slot], [row], [0], [0])
        tokens = [7] * work.batch
        for _ in range(WARM_UP):
            runner.decode(slots, tokens)
        step_ms = _median_ms(lambda: runner.decode(slots, tokens), work.steps)
        used = _used_mb() - before
        prefill = None
        if work.batch == 1:
            runner.grow(work.prompt)
            (prompt,) = _ids(vocab, 1, work.prompt)
            ms = _median_ms(lambda: runner.prefill([0], [prompt], [0], [1]), 5)
            prefill = work.prompt / ms * 1e3
    model = bundle.manifest.model
    caches = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    caches *= 2 * work.batch * (work.past + work.steps + WARM_UP)
    size = bundle.manifest.files[bundle.manifest.weights.file].num_bytes
    weights = size if work.precision.startswith("int") else size // 2
    greedy, sampled = _generated_ms(bundle, work) if work.batch == 1 else (None, None)
    held = (weights + caches) / 1e6
    return Measured(step_ms, prefill, greedy, used, held, sampled_step_ms=sampled)


def _generated_ms(bundle: Any, work: Work) -> tuple[float, float]:
    """A step of `LLM.generate`, greedy and sampled: a long answer less a short one."""
    from qwen_runtime import llm as module

    unproved = functools.partial(module.open_runner, proved=False)
    proved, module.open_runner = module.open_runner, unproved  # type: ignore[assignment]
    try:
        opened = module.LLM(bundle, device="cuda")
    finally:
        module.open_runner = proved
    (prompt,) = _ids(bundle.manifest.model.vocab_size, 1, work.past).tolist()

    def seconds(tokens: int, settings: dict[str, Any]) -> float:
        began = time.perf_counter()
        opened.generate(prompt, max_new_tokens=tokens, eos_token_id=None, **settings)
        return time.perf_counter() - began

    def step_ms(settings: dict[str, Any]) -> float:
        seconds(WARM_UP, settings)
        short, long = WARM_UP, work.steps + WARM_UP
        pairs = [(seconds(short, settings), seconds(long, settings)) for _ in range(5)]
        return statistics.median(second - first for first, second in pairs) / work.steps * 1e3

    with opened:
        return step_ms(_GREEDY), step_ms(_SAMPLED)


def _transformers(work: Work, checkpoint: Path, folder: Path, *, compiled: bool) -> Measured:
    import torch

    measured = _run_transformers(work, checkpoint, compiled=compiled)
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return measured


def _run_transformers(work: Work, checkpoint: Path, *, compiled: bool) -> Measured:
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    before = _used_mb()
    dtype = getattr(torch, _TORCH[work.compute_dtype])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).cuda().eval()
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True) if compiled else model
    length = max(work.prompt, work.past + work.steps + WARM_UP)
    cache = StaticCache(config=model.config, max_cache_len=length)
    vocab = model.config.vocab_size

    def call(ids: Any, first: int, function: Any) -> None:
        positions = torch.arange(first, first + ids.shape[1], device="cuda")
        function(
            ids,
            past_key_values=cache,
            cache_position=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        torch.cuda.synchronize()

    with torch.inference_mode():
        call(torch.from_numpy(_ids(vocab, work.batch, work.past)).cuda(), 0, model)
        token = torch.full((work.batch, 1), 7, device="cuda")
        place = iter(range(work.past, length))
        for _ in range(WARM_UP):
            call(token, next(place), forward)
        step_ms = _median_ms(lambda: call(token, next(place), forward), work.steps)
        used, prefill = _used_mb() - before, None
        if work.batch == 1:
            prompt = torch.from_numpy(_ids(vocab, 1, work.prompt)).cuda()
            prefill = work.prompt / _median_ms(lambda: call(prompt, 0, model), 5) * 1e3
    return Measured(step_ms, prefill, None, used, None)


def _genai(work: Work, checkpoint: Path, folder: Path) -> Measured:
    import onnxruntime_genai as og

    path = folder / f"{checkpoint.name}-{work.precision}-genai"
    if not path.exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
        command += ["-o", str(path), "-p", work.precision, "-e", "cuda"]
        command += ["--extra_options", "enable_cuda_graph=1"]
        subprocess.run(command, check=True)
    before = _used_mb()
    model = og.Model(str(path))

    def started(rows: int, length: int) -> Any:
        params = og.GeneratorParams(model)
        room = length + work.steps + WARM_UP + 1
        params.set_search_options(do_sample=False, batch_size=rows, max_length=room)
        generator = og.Generator(model, params)
        generator.append_tokens(_ids(150_000, rows, length).astype(np.int32))
        return generator

    generator = started(work.batch, work.past)
    for _ in range(WARM_UP):
        generator.generate_next_token()
    step_ms = _median_ms(generator.generate_next_token, work.steps)
    used = _used_mb() - before
    del generator
    prefill = None
    if work.batch == 1:
        prefill = work.prompt / _median_ms(lambda: started(1, work.prompt), 5) * 1e3
    return Measured(step_ms, prefill, None, used, None, "a step includes its greedy choice")


def _median_ms(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e3


def _any(value: str) -> Any:
    return value


CONTENDERS: dict[str, Contender] = {
    "ours": _ours,
    "transformers eager": functools.partial(_transformers, compiled=False),
    "transformers compiled": functools.partial(_transformers, compiled=True),
    "onnxruntime-genai": _genai,
}
"""By name, in the order of the table."""
