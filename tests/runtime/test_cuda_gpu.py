"""What only a GPU can show: the provider's own kernels, CUDA graphs, and memory on the device.

    pytest -m gpu tests/runtime/test_cuda_gpu.py

Needs onnxruntime-gpu and cuda-bindings (the extra ``cuda``) and a CUDA 13 driver.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tensorrt_engines import linked_bundle

from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_runtime import LLM, BackendError
from qwen_runtime.backends.cuda import CudaRunner
from qwen_runtime.backends.cuda.nvidia import load_seam
from qwen_runtime.backends.cuda.seam import CudaSeam
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.bundle import Bundle

pytestmark = pytest.mark.gpu

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
TOLERANCES = {"fp32": 1e-4, "fp16": 0.0125, "bf16": 0.1}


@pytest.fixture(scope="session")
def seam() -> CudaSeam:
    """Of the widest scope and asked for first: what is skipped builds no bundle."""
    try:
        seam = load_seam()
    except BackendError as error:
        pytest.skip(f"no CUDA provider: {error}")
    if not seam.cuda_versions()[0]:
        pytest.skip("no NVIDIA driver")
    return seam


@pytest.fixture(params=["fp32", "fp16", "bf16"])
def compute_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def runner(
    seam: CudaSeam,
    embedded_bundle: Path,
    tmp_path: Path,
    compute_dtype: Literal["fp32", "fp16", "bf16"],
) -> Iterator[CudaRunner]:
    bundle = linked_bundle(embedded_bundle, tmp_path / "bundle")
    folder = lower_bundle(bundle, "cuda", LoweringOptions(compute_dtype=compute_dtype))
    opened = CudaRunner(bundle, folder, seam)
    yield opened
    opened.close()


def test_prompts_and_captured_steps_answer_like_the_cpus_runner(
    runner: CudaRunner, embedded_bundle: Path, compute_dtype: str
) -> None:
    reference = OnnxRuntimeRunner(Bundle.open(embedded_bundle))
    rng = np.random.default_rng(0)
    vocab = runner.limits.vocab_size
    tokens = [rng.integers(0, vocab, length) for length in (5, 30, 9, 40)]
    steps = rng.integers(0, vocab, (6, 4))
    answers = []
    for each in (runner, reference):
        each.allocate(4, 1)
        found = [row.copy() for row in each.prefill(range(4), tokens, [0] * 4, [1, 30, 1, 12])]
        found += [each.decode(range(4), step.tolist()).copy() for step in steps]
        each.copy(1, 3, 20)
        found.append(each.decode([3, 0], [4, 5]).copy())
        each.grow(300)  # the caches move: what was captured must not be launched again
        found += [each.decode(range(4), step.tolist()).copy() for step in steps]
        answers.append(found)
    reference.close()

    assert runner.num_graphs > 0
    for ours, expected in zip(*answers, strict=True):
        assert np.abs(ours - expected).max() <= TOLERANCES[compute_dtype] * np.abs(expected).max()


def test_a_captured_step_answers_bit_for_bit_like_a_plain_one(runner: CudaRunner) -> None:
    prompt = np.arange(3, 20)
    answers = []
    for _ in range(3):  # plain, captured, launched
        runner.allocate(1, 1)
        runner.prefill([0], [prompt], [0], [1])
        answers.append(runner.decode([0], [7]).copy())

    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[1], answers[2])


def test_tokens_chosen_on_the_device_are_those_of_the_logits(runner: CudaRunner) -> None:
    prompts = [np.arange(3, 20), np.arange(40, 45)]
    runner.allocate(2, 1)
    for _ in range(4):
        runner.prefill([0, 1], prompts, [0, 0], [1, 1])
        expected = runner.decode([0, 1], [7, 9]).argmax(axis=-1)
        runner.prefill([0, 1], prompts, [0, 0], [1, 1])
        assert runner.decode_argmax([0, 1], [7, 9]).tolist() == expected.tolist()


def test_the_highest_logits_found_on_the_device_are_those_of_whole_rows(
    runner: CudaRunner,
) -> None:
    slots, tokens = range(40), [7 + slot for slot in range(40)]
    runner.allocate(40, 1)
    prompts = [np.arange(3 + slot, 20 + slot) for slot in slots]
    for _ in range(4):  # two blocks; plain, captured, launched
        runner.prefill(slots, prompts, [0] * 40, [1] * 40)
        whole = runner.decode(slots, tokens).copy()
        runner.prefill(slots, prompts, [0] * 40, [1] * 40)
        found = runner.decode_top(slots, tokens)
        assert found.best.tolist() == whole.argmax(axis=-1).tolist()
        np.testing.assert_array_equal(np.take_along_axis(whole, found.tokens, 1), found.logits)
        np.testing.assert_array_equal(
            -np.sort(-found.logits), -np.sort(-whole)[:, : runner.num_top]
        )
        assert all(len(set(row)) == runner.num_top for row in found.tokens.tolist())
        np.testing.assert_array_equal(runner.whole_logits([0, 39, 17]), whole[[0, 39, 17]])


def test_caches_are_on_the_device_and_given_back(runner: CudaRunner, seam: CudaSeam) -> None:
    free = seam.free_bytes()

    runner.allocate(8, 1024)

    assert free - seam.free_bytes() >= runner.cache_bytes
    runner.close()
    assert seam.free_bytes() >= free


def test_a_captured_step_of_a_small_model_takes_less_than_ten_milliseconds(
    runner: CudaRunner,
) -> None:
    runner.allocate(1, 600)
    runner.prefill([0], [np.arange(1, 500)], [0], [1])
    for _ in range(3):
        runner.decode_argmax([0], [7])
    began = time.perf_counter()
    for _ in range(50):
        runner.decode_argmax([0], [7])

    assert (time.perf_counter() - began) / 50 < 0.01


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_embedded_model_is_proved_and_generates_like_on_the_cpu(
    tmp_path: Path,
    seam: CudaSeam,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Literal["fp32", "bf16"],
    verified_bundle: Path,
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    bundle = linked_bundle(verified_bundle, tmp_path / "bundle")
    # A head of 8 takes the standard operators in any type.
    lower_bundle(bundle, "cuda", LoweringOptions(compute_dtype=dtype))
    rows = linked_bundle(verified_bundle, tmp_path / "rows")
    lower_bundle(rows, "cuda", LoweringOptions(compute_dtype=dtype, num_top=0))
    with (
        LLM(bundle, device="cuda") as ours,
        LLM(rows, device="cuda") as whole,
        LLM(verified_bundle) as expected,
    ):
        prompt = [5, 17, 99, 42, 7]
        found = ours.generate(prompt, **GREEDY).token_ids
        assert len(found) > 0
        if dtype == "fp32":
            assert found == expected.generate(prompt, **GREEDY).token_ids
        sampled = {"max_new_tokens": 24, "do_sample": True, "top_k": 20, "top_p": 0.8, "seed": 5}
        drawn = ours.generate(prompt, **sampled).token_ids
        assert drawn == whole.generate(prompt, **sampled).token_ids
        beams = ours.generate(prompt, num_beams=4, **GREEDY)
        assert len(beams.token_ids) > 0
