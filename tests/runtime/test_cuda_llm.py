"""`LLM(bundle, device="cuda")` on a device in memory: every mode answers as it does on the CPU."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_double import HostSeam
from tensorrt_engines import linked_bundle

from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_runtime import LLM, BackendError
from qwen_runtime.backends.cuda import CudaRunner, opening
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.backends.registry import open_runner
from qwen_runtime.bundle import Bundle
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
def folder(verified_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest bundle with graphs for CUDA in float32."""
    root = tmp_path_factory.mktemp("cuda")
    bundle = linked_bundle(verified_bundle, root / "bundle")
    lower_bundle(bundle, "cuda", LoweringOptions(compute_dtype="fp32", attention="group_query"))
    return bundle.path


@pytest.fixture(scope="module")
def device() -> HostSeam:
    return HostSeam()


@pytest.fixture(scope="module")
def llm(folder: Path, device: HostSeam) -> Iterator[LLM]:
    """The bundle on the device, proved when it was loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder.parent / "cache"))
        patch.setattr(opening, "load_seam", lambda: device)
        with LLM(folder, device="cuda") as loaded:
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


def test_greedy_search_brings_tokens_and_no_logits(
    llm: LLM, tiny_llm: LLM, device: HostSeam
) -> None:
    llm.generate(PROMPT, **GREEDY)
    before = device.counts.copy()

    ours = llm.generate([*PROMPT[:4], 8], **GREEDY)

    assert ours.token_ids == tiny_llm.generate([*PROMPT[:4], 8], **GREEDY).token_ids
    # The prompt's logits, then a token a step.
    assert (device.counts - before)["to_host"] <= 128 * 4 + 11 * 8


@pytest.mark.parametrize(
    "setting",
    [
        {"logprobs": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"output_scores": True, "return_dict_in_generate": True},
        {"renormalize_logits": True},
        {"do_sample": True, "seed": 3, "top_k": 0},
    ],
)
def test_whoever_needs_logits_gets_them(
    llm: LLM, tiny_llm: LLM, device: HostSeam, setting: dict[str, Any]
) -> None:
    before = device.counts.copy()

    ours = llm.generate(PROMPT, **GREEDY | setting)

    assert ours.token_ids == tiny_llm.generate(PROMPT, **GREEDY | setting).token_ids
    assert (device.counts - before)["to_host"] >= 12 * 128 * 4


def test_a_greedy_request_beside_one_that_needs_logits_answers_the_same(
    llm: LLM, tiny_llm: LLM
) -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 128, length).tolist() for length in range(1, 12)]

    ours = llm.generate(prompts, **GREEDY)

    expected = tiny_llm.generate(prompts, **GREEDY)
    assert [each.token_ids for each in ours] == [each.token_ids for each in expected]


def test_requests_one_after_the_other_reuse_slots_and_graphs(llm: LLM, device: HostSeam) -> None:
    first = llm.generate(PROMPT, **GREEDY)
    llm.generate(PROMPT, **GREEDY)
    before = device.counts.copy()

    again = llm.generate(PROMPT, **GREEDY)

    spent = device.counts - before
    assert again.token_ids == first.token_ids
    assert (spent["capture"], spent["allocation"]) == (0, 0)
    assert spent["launch"] == 11


def test_a_prompt_that_begins_like_an_earlier_one_is_computed_from_there(
    llm: LLM, tiny_llm: LLM
) -> None:
    rng = np.random.default_rng(3)
    shared = rng.integers(0, 128, 30).tolist()
    llm.generate([*shared, 1, 2], **GREEDY)

    ours = llm.generate([*shared, 3, 4, 5], **GREEDY)

    assert ours.num_cached_tokens == 30
    assert ours.token_ids == tiny_llm.generate([*shared, 3, 4, 5], **GREEDY).token_ids


def test_it_drafts_for_a_model_on_the_cpu(llm: LLM, tiny_llm: LLM) -> None:
    ours = tiny_llm.generate(PROMPT, assistant_model=llm, **GREEDY)

    assert ours.token_ids == tiny_llm.generate(PROMPT, **GREEDY).token_ids


# --- proof --------------------------------------------------------------------------------------


class Forgetful(HostSeam):
    """Loses the inputs of steps: every token after the first is computed from another."""

    def run(self, session: Any, binding: Any, stream: int, graph: int) -> None:
        if binding.shapes["input_ids"][1] == 1:
            _, address, size = binding.places["input_ids"]
            self.zero(address, size, stream)
        super().run(session, binding, stream, graph)


def test_graphs_are_proved_once_on_a_device_and_refused_where_they_answer_otherwise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))

    def runs(seam: HostSeam, **arguments: Any) -> int:
        monkeypatch.setattr(opening, "load_seam", lambda: seam)
        LLM(folder, device="cuda", **arguments).close()
        return seam.counts["run"]

    with pytest.raises(
        BackendError, match=r"must answer like its checkpoint on Host.*make them again"
    ):
        runs(Forgetful())
    assert runs(HostSeam()) > 5
    assert runs(HostSeam()) == 0
    assert runs(HostSeam(sm=80)) > 5


class OneToken(HostSeam):
    """Computes logits, and always chooses token 0."""

    def run(self, session: Any, binding: Any, stream: int, graph: int) -> None:
        super().run(session, binding, stream, graph)
        if "next_tokens" in binding.places:
            _, address, size = binding.places["next_tokens"]
            self.zero(address, size, stream)


def test_tokens_that_a_device_chooses_are_proved_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    seam = OneToken()
    monkeypatch.setattr(opening, "load_seam", lambda: seam)

    with pytest.raises(
        BackendError,
        match=r"must choose the token with the highest logit on Host, .*chose 0 where",
    ):
        LLM(folder, device="cuda")

    assert seam.leaks() == {}
    assert not list(tmp_path.rglob("*.json"))


def test_graphs_that_are_to_be_measured_are_opened_unproved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seam = HostSeam()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(opening, "load_seam", lambda: seam)

    runner = open_runner(Bundle.open(folder), device="cuda", proved=False)

    assert isinstance(runner, CudaRunner)
    assert seam.counts["run"] == 0
    runner.close()
