"""Sampling from the highest logits that a device brings: the tokens of whole rows, bit for bit."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_double import HostSeam
from tensorrt_engines import linked_bundle

from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_runtime import LLM, AsyncLLM, RequestError
from qwen_runtime.backends.cuda import CudaRunner, opening
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.bundle import Bundle
from qwen_runtime.generation_config import GenerationConfigWarning

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((GOLDEN / "e2e.json").read_text("utf-8"))
    if case["model"] == "qwen2_untied"
    and case["kwargs"].get("num_beams", 1) == 1
    and case["assistant"] is None
    and case["prefix_fn"] is None
    and not {"watermarking_config", "guidance_scale", "prompt_lookup_num_tokens"}
    & set(case["kwargs"])
]
VOCAB = 128
PROMPT = [5, 17, 99, 42, 7]
QWEN: dict[str, Any] = {
    "do_sample": True,
    "seed": 11,
    "max_new_tokens": 24,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
}
Device = tuple[LLM, CudaRunner, HostSeam]


def lowered(source: Path, target: Path, num_top: int) -> Bundle:
    bundle = linked_bundle(source, target)
    options = LoweringOptions("fp32", "group_query", num_top=num_top)
    lower_bundle(bundle, "cuda", options)
    return bundle


@pytest.fixture(scope="module")
def device(
    verified_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int], Device]]:
    """The bundle on a device that brings so many logits; the same one when asked again."""
    root = tmp_path_factory.mktemp("top")
    opened: dict[int, Device] = {}

    def get(num_top: int) -> Device:
        if num_top not in opened:
            seam, runners = HostSeam(), []

            def remember(*arguments: Any) -> CudaRunner:
                runners.append(CudaRunner(*arguments))
                return runners[-1]

            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(CACHE_VARIABLE, str(root / "cache"))
                patch.setattr(opening, "load_seam", lambda: seam)
                patch.setattr(opening, "CudaRunner", remember)
                bundle = lowered(verified_bundle, root / str(num_top), num_top)
                opened[num_top] = (LLM(bundle.path, device="cuda"), runners[0], seam)
        return opened[num_top]

    yield get
    for llm, _, seam in opened.values():
        llm.close()
        assert seam.leaks() == {}


@pytest.fixture(autouse=True)
def recorded_settings_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GenerationConfigWarning)
        yield


def rows_of(runner: CudaRunner) -> tuple[int, int]:
    return runner.num_top_rows, runner.num_whole_rows


# --- the same tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("num_top", [8, 64])
def test_a_recorded_run_is_the_same_with_and_without_them(
    case: dict[str, Any], num_top: int, device: Callable[[int], Device]
) -> None:
    seeds = {} if case["seed"] is None else {"seed": case["seed"], "rng": "torch"}
    found = [
        device(number)[0].generate(
            input_ids=case["input_ids"],
            attention_mask=case["attention_mask"],
            **case["kwargs"],
            **seeds,
        )
        for number in (num_top, 0)
    ]

    if case["input_ids"] is None:
        assert found[0].token_ids == found[1].token_ids
    else:
        assert found[0].sequences.tolist() == found[1].sequences.tolist() == case["sequences"]


@pytest.mark.parametrize("rng", ["default", "torch"])
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"num_return_sequences": 3},
        {"top_k": 3, "min_p": 0.05, "typical_p": 0.9},
        {"presence_penalty": 0.5, "frequency_penalty": -0.2, "repetition_penalty": 0.9},
        {"logit_bias": {3: 4.0, 90: -100.0}, "suppress_tokens": [11, 12]},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[4], [5, 6]], "min_new_tokens": 9},
        {"do_sample": False},
    ],
    ids=lambda setting: "-".join(setting) or "qwen",
)
def test_settings_of_every_kind_draw_the_same(
    setting: dict[str, Any], rng: str, device: Callable[[int], Device]
) -> None:
    arguments = QWEN | {"rng": rng} | setting
    before = rows_of(device(64)[1])

    ours = device(64)[0].generate([PROMPT, [9, 9], [1]], **arguments)

    expected = device(0)[0].generate([PROMPT, [9, 9], [1]], **arguments)
    assert [each.token_ids for each in ours] == [each.token_ids for each in expected]
    asked, whole = (b - a for a, b in zip(before, rows_of(device(64)[1]), strict=True))
    assert asked > 30
    assert whole < asked / 4


def test_a_step_brings_the_highest_logits_and_no_others(device: Callable[[int], Device]) -> None:
    llm, runner, seam = device(24)
    llm.generate(PROMPT, **QWEN)
    before, rows = seam.counts.copy(), rows_of(runner)

    llm.generate([*PROMPT, 3], **QWEN | {"repetition_penalty": 1.0})

    asked, whole = (b - a for a, b in zip(rows, rows_of(runner), strict=True))
    assert (asked, whole) == (23, 0)
    # The prompt's logits; then a token, and 24 logits with their tokens a step.
    assert (seam.counts - before)["to_host"] == VOCAB * 4 + 23 * (8 + 24 * (4 + 8))


def test_all_of_a_small_vocabulary_may_be_the_highest(device: Callable[[int], Device]) -> None:
    llm, runner, _ = device(256)
    arguments = QWEN | {"top_k": 100, "temperature": 3.0}
    asked, whole = rows_of(runner)

    ours = llm.generate(PROMPT, **arguments)

    assert runner.num_top == VOCAB
    assert ours.token_ids == device(0)[0].generate(PROMPT, **arguments).token_ids
    assert rows_of(runner) == (asked + 23, whole)


# --- what they cannot prove ---------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"repetition_penalty": 5.0}, {"logit_bias": {77: 30.0}}])
def test_rows_that_are_not_proved_bring_all_and_are_counted(
    setting: dict[str, Any], device: Callable[[int], Device]
) -> None:
    arguments = QWEN | {"top_k": 7} | setting
    llm, runner, seam = device(8)
    asked, whole = rows_of(runner)
    before = seam.counts.copy()

    ours = llm.generate(PROMPT, **arguments)

    assert ours.token_ids == device(0)[0].generate(PROMPT, **arguments).token_ids
    assert runner.num_top_rows - asked == 23
    refused = runner.num_whole_rows - whole
    assert refused > 0
    brought = (seam.counts - before)["to_host"]
    assert brought == (1 + refused) * VOCAB * 4 + 23 * (8 + 8 * (4 + 8))


@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 8},
        {"top_k": 0},
        {"logprobs": True},
        {"output_scores": True, "return_dict_in_generate": True},
        {"output_logits": True, "return_dict_in_generate": True},
        {"logits_processor": [lambda ids, scores: scores + 1]},
        {"remove_invalid_values": True},
        {"top_h": 0.5},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_whoever_may_need_all_logits_is_not_asked(
    setting: dict[str, Any], device: Callable[[int], Device]
) -> None:
    llm, runner, _ = device(8)
    before = rows_of(runner)

    ours = llm.generate(PROMPT, **QWEN | {"top_k": 5} | setting)

    expected = device(0)[0].generate(PROMPT, **QWEN | {"top_k": 5} | setting)
    assert ours.token_ids == expected.token_ids
    assert rows_of(runner) == before


def test_requests_of_all_kinds_share_steps_and_answer_the_same(
    device: Callable[[int], Device],
) -> None:
    def answers(llm: LLM, kinds: list[dict[str, Any]]) -> list[list[int]]:
        async def together() -> list[Any]:
            service = AsyncLLM(llm)
            calls = [
                service.generate(PROMPT[:length], **QWEN | kind)
                for length, kind in enumerate(kinds, start=1)
            ]
            return list(await asyncio.gather(*calls))

        return [output.token_ids for output in asyncio.run(together())]

    greedy = {"do_sample": False, "repetition_penalty": 1.0}
    kinds = [{}, greedy, {"do_sample": False}, {"seed": 2, "top_k": 3}]
    for mixture in (kinds, [*kinds, {"logprobs": True}]):
        assert answers(device(64)[0], mixture) == answers(device(0)[0], mixture)


def test_a_row_that_nothing_can_be_drawn_from_fails_as_it_does_whole(
    device: Callable[[int], Device],
) -> None:
    # The first token comes from the prompt's logits, which are whole.
    banned = [[3, token] for token in range(VOCAB)]
    arguments = QWEN | {"bad_words_ids": banned, "logit_bias": {3: 100.0}}
    for number in (64, 0):
        with pytest.raises(RequestError, match="at least one token must keep a score"):
            device(number)[0].generate(PROMPT, **arguments)
