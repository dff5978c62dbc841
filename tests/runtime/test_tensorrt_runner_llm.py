"""`LLM(bundle, backend="tensorrt")` on a device in memory: every mode answers as it does on the CPU."""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_double import TensorRtDouble
from tensorrt_engines import add_engine, linked_bundle

from qwen_runtime import LLM, CapacityError
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.backends.tensorrt import opening
from qwen_runtime.generation_config import GenerationConfigWarning

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((GOLDEN / "e2e.json").read_text("utf-8"))
    if case["model"] == "qwen2_untied" and "watermarking_config" not in case["kwargs"]
]
"""All but one, whose setting no backend takes."""
PROMPT = [5, 17, 99, 42, 7]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def device() -> TensorRtDouble:
    return TensorRtDouble()


@pytest.fixture(scope="module")
def llm(
    verified_bundle: Path, device: TensorRtDouble, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """The smallest model as an engine with exact types, proved when it was loaded."""
    folder = tmp_path_factory.mktemp("tensorrt")
    bundle = linked_bundle(verified_bundle, folder / "bundle")
    add_engine(bundle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder / "cache"))
        patch.setattr(opening, "load_seam", lambda flavour: device)
        with LLM(bundle, backend="tensorrt", device="cuda") as loaded:
            yield loaded
    assert device.leaks() == {}


@pytest.fixture(autouse=True)
def recorded_settings_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GenerationConfigWarning)
        yield


def arguments_of(case: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(case["kwargs"])
    if case["seed"] is not None:
        arguments |= {"seed": case["seed"], "rng": "torch"}
    if case["prefix_fn"] == "allow_mod3":
        arguments["prefix_allowed_tokens_fn"] = lambda row, ids: [
            token for token in range(128) if token % 3 == (len(ids) + row) % 3
        ]
    return arguments


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_run_is_reproduced(
    case: dict[str, Any], llm: LLM, golden_llm: Callable[[str], LLM]
) -> None:
    arguments = arguments_of(case)
    if case["assistant"] is not None:
        assistant = golden_llm(case["assistant"])
        before = assistant.generation_config
        settings = case["assistant_generation_config"]
        assistant.generation_config = dataclasses.replace(before, **settings)
        arguments["assistant_model"] = assistant
    try:
        output = llm.generate(
            input_ids=case["input_ids"], attention_mask=case["attention_mask"], **arguments
        )
    finally:
        if case["assistant"] is not None:
            assistant.generation_config = before

    if case["input_ids"] is None:
        assert [output.prompt_token_ids + output.token_ids] == case["sequences"]
    else:
        assert output.sequences.tolist() == case["sequences"]


def test_the_recorded_runs_are_those_of_every_mode() -> None:
    kwargs = [case["kwargs"] for case in CASES]
    assert len(CASES) == 127
    assert sum(each.get("num_beams", 1) > 1 for each in kwargs) == 52
    assert sum(bool(each.get("do_sample")) for each in kwargs) == 20
    assert sum(case["assistant"] is not None for case in CASES) == 16


def test_streamed_text_is_that_of_the_cpu(
    text_bundle: Path, text_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = linked_bundle(text_bundle, tmp_path / "bundle")
    add_engine(bundle)
    monkeypatch.setattr(opening, "load_seam", lambda flavour: TensorRtDouble())
    # A bundle built without verification has nothing to prove its engine with.
    monkeypatch.setattr(opening, "prove", lambda *_: None)
    with LLM(bundle, backend="tensorrt") as llm:
        pieces = list(llm.stream("Hello", **GREEDY))
        sampled = llm.generate("Hello", do_sample=True, seed=7, max_new_tokens=20)

    assert len(pieces) > 3
    assert "".join(pieces) == text_llm.generate("Hello", **GREEDY).text
    expected = text_llm.generate("Hello", do_sample=True, seed=7, max_new_tokens=20)
    assert sampled.text == expected.text


def test_a_prompt_that_begins_like_an_earlier_one_is_computed_from_there(
    llm: LLM, tiny_llm: LLM
) -> None:
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 128, 30).tolist()
    llm.generate([*shared, 1, 2], **GREEDY)

    ours = llm.generate([*shared, 3, 4, 5], **GREEDY)

    assert ours.num_cached_tokens == 30
    assert ours.token_ids == tiny_llm.generate([*shared, 3, 4, 5], **GREEDY).token_ids


def test_many_prompts_use_more_slots_than_a_call_has_rows(
    llm: LLM, tiny_llm: LLM, device: TensorRtDouble
) -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 128, length).tolist() for length in range(1, 15)]
    then = len(device.ran)

    ours = llm.generate(prompts, **GREEDY)

    expected = tiny_llm.generate(prompts, **GREEDY)
    assert [each.token_ids for each in ours] == [each.token_ids for each in expected]
    assert max(shape[0] for _, _, shape in device.ran[then:]) == 4


def test_requests_one_after_the_other_reuse_slots_and_graphs(
    llm: LLM, device: TensorRtDouble
) -> None:
    first = llm.generate(PROMPT, **GREEDY)
    slots = llm._engine.model._runner.num_slots
    llm.generate(PROMPT, **GREEDY)
    before = device.counts.copy()

    again = llm.generate(PROMPT, **GREEDY)

    spent = device.counts - before
    assert again.token_ids == first.token_ids
    assert llm._engine.model._runner.num_slots == slots
    assert (spent["capture"], spent["allocation"]) == (0, 0)
    assert spent["launch"] == 11


def test_threads_share_the_device(llm: LLM, tiny_llm: LLM) -> None:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 128, length).tolist() for length in (4, 9, 5, 12)]
    ready = threading.Barrier(len(prompts))

    def run(prompt: list[int]) -> list[int]:
        ready.wait(10)
        return list(llm.generate(prompt, **GREEDY).token_ids)

    with ThreadPoolExecutor(len(prompts)) as pool:
        ours = list(pool.map(run, prompts))

    assert ours == [tiny_llm.generate(prompt, **GREEDY).token_ids for prompt in prompts]


def test_an_engine_drafts_for_a_model_on_the_cpu(llm: LLM, tiny_llm: LLM) -> None:
    ours = tiny_llm.generate(PROMPT, assistant_model=llm, **GREEDY)

    assert ours.token_ids == tiny_llm.generate(PROMPT, **GREEDY).token_ids


def test_bf16_caches_answer_nearly_alike(
    verified_bundle: Path, tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = linked_bundle(verified_bundle, tmp_path / "bundle")
    add_engine(bundle, dtype="BF16", separate=True)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(opening, "load_seam", lambda flavour: TensorRtDouble())
    wanted: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    with LLM(bundle, backend="tensorrt") as llm:
        ours = llm.generate(PROMPT, do_sample=False, max_new_tokens=4, **wanted)
    expected = tiny_llm.generate(PROMPT, do_sample=False, max_new_tokens=4, **wanted)

    difference = np.abs(np.stack(ours.logits) - np.stack(expected.logits)).max()
    assert 0 < difference <= 0.1 * np.abs(np.stack(expected.logits)).max()


def test_a_prompt_beyond_the_engines_capacity_is_refused_before_it_runs(
    verified_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = linked_bundle(verified_bundle, tmp_path / "bundle")
    add_engine(bundle, capacity=48)
    device = TensorRtDouble()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(opening, "load_seam", lambda flavour: device)
    with LLM(bundle, backend="tensorrt") as llm:
        then = len(device.ran)
        with pytest.raises(CapacityError, match=r"into 48 tokens .*its engine\), got 40 \+ 12"):
            llm.generate(list(range(40)), **GREEDY)
        assert len(device.ran) == then
        assert len(llm.generate(list(range(37)), **GREEDY).token_ids) == 12
