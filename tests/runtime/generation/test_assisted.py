"""Assisted generation: what the model alone would say, in fewer calls of it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import LLM
from qwen_runtime.generation_config import GenerationConfigWarning

DATA = Path(__file__).parents[2] / "data"
GOLDEN = DATA / "golden"
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((GOLDEN / "e2e.json").read_text("utf-8"))
    if case["assistant"] is not None
]
PROMPT = [5, 17, 99, 42, 7]

LoadLLM = Callable[[str], LLM]


def adjust(llm: LLM, **settings: Any) -> None:
    llm.generation_config = dataclasses.replace(llm.generation_config, **settings)


def assert_no_slot_is_held(*llms: LLM) -> None:
    assert [llm._engine.model.num_used_slots for llm in llms] == [0] * len(llms)


def test_sixteen_recorded_runs_are_replayed() -> None:
    assert len(CASES) == 16
    assert sum(case["kwargs"]["do_sample"] for case in CASES) == 6


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_run_is_reproduced(case: dict[str, Any], golden_llm: LoadLLM) -> None:
    llm, assistant = golden_llm(case["model"]), golden_llm(case["assistant"])
    arguments = dict(case["kwargs"])
    if case["seed"] is not None:
        arguments |= {"seed": case["seed"], "rng": "torch"}
    before = assistant.generation_config
    adjust(assistant, **case["assistant_generation_config"])
    try:
        output = llm.generate(
            input_ids=case["input_ids"],
            assistant_model=assistant,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **arguments,
        )
    finally:
        assistant.generation_config = before

    assert output.sequences.tolist() == case["sequences"]
    saved = output.outputs[0].assistance
    assert saved.drafted == saved.draft_calls == sum(case["draft_lengths"])
    num_new = len(case["sequences"][0]) - len(case["input_ids"][0])
    # Each call of the model gives one token of its own, beside the candidates it accepts.
    assert saved.accepted <= num_new <= saved.accepted + saved.model_calls
    assert len(output.scores) == len(output.logits) == num_new
    with np.load(GOLDEN / "e2e.npz") as recorded:
        for kind in ("scores", "logits"):
            if f"e{case['idx']}_{kind}" in recorded:
                expected = recorded[f"e{case['idx']}_{kind}"]
                ours = np.stack(getattr(output, kind))
                np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(expected))
                scale = np.abs(expected[np.isfinite(expected)]).max()
                np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * scale)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"eos_token_id": [44, 113, 3]},
        {"min_new_tokens": 6, "eos_token_id": list(range(60))},
        {"logprobs": True, "top_logprobs": 2},
        {"logits_processor": [lambda ids, scores: np.roll(scores, ids.shape[1], axis=1)]},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(len(ids) % 2, 128, 2)},
        {"stopping_criteria": [lambda ids, scores: ids[:, -1] % 5 == 0]},
        {"max_time": 0.0},
    ],
    ids=str,
)
def test_greedy_answer_is_that_of_the_model_alone(
    settings: dict[str, Any], tiny_llm: LLM, draft: LLM
) -> None:
    for prompt in (PROMPT, [9], [1, 2, 3] * 5):
        plain = tiny_llm.generate(prompt, max_new_tokens=14, **settings)
        assisted = tiny_llm.generate(prompt, max_new_tokens=14, assistant_model=draft, **settings)

        assert assisted.token_ids == plain.token_ids
        assert assisted.finish_reason == plain.finish_reason
        assert assisted.stop_reason == plain.stop_reason
        if settings.get("logprobs"):
            assert [p.token_id for p in assisted.logprobs] == plain.token_ids
            np.testing.assert_allclose(
                [p.logprob for p in assisted.logprobs],
                [p.logprob for p in plain.logprobs],
                atol=1e-4,
            )


def test_draft_that_equals_the_model_is_always_accepted(tiny_llm: LLM) -> None:
    before = tiny_llm.generation_config
    adjust(tiny_llm, num_assistant_tokens=5, assistant_confidence_threshold=0.0)
    try:
        greedy = tiny_llm.generate(PROMPT, max_new_tokens=18, assistant_model=tiny_llm)
        drawn = tiny_llm.generate(
            PROMPT, max_new_tokens=18, assistant_model=tiny_llm, do_sample=True, seed=3
        )
    finally:
        tiny_llm.generation_config = before

    for output in (greedy, drawn):
        assert output.assistance.accepted == output.assistance.drafted == 15
        assert output.assistance.model_calls == 3
    assert_no_slot_is_held(tiny_llm)


def test_unlikely_candidates_end_a_draft(tiny_llm: LLM, draft: LLM) -> None:
    adjust(draft, assistant_confidence_threshold=1.0)
    output = tiny_llm.generate(PROMPT, max_new_tokens=8, assistant_model=draft)

    # The first unsure token is still checked.
    assert output.assistance.drafted == output.assistance.draft_calls <= 7
    assert output.assistance.drafted >= output.assistance.model_calls - 1


def test_heuristic_schedule_is_remembered_by_the_draft(tiny_llm: LLM, draft: LLM) -> None:
    adjust(draft, num_assistant_tokens_schedule="heuristic", num_assistant_tokens=9)
    tiny_llm.generate(PROMPT, max_new_tokens=6, assistant_model=draft)
    assert draft.generation_config.num_assistant_tokens != 9

    adjust(draft, num_assistant_tokens_schedule="heuristic_transient", num_assistant_tokens=9)
    tiny_llm.generate(PROMPT, max_new_tokens=6, assistant_model=draft)
    assert draft.generation_config.num_assistant_tokens == 9


def test_prompts_of_a_list_are_drafted_for_one_by_one(tiny_llm: LLM, draft: LLM) -> None:
    prompts = [PROMPT, [9], [1, 2, 3]]
    sampled = {"do_sample": True, "seed": 1, "max_new_tokens": 9, "assistant_model": draft}

    together = tiny_llm.generate(prompts, **sampled)

    alone = [tiny_llm.generate(prompt, **sampled) for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert_no_slot_is_held(tiny_llm, draft)


def test_left_padding_does_not_change_the_answer(tiny_llm: LLM, draft: LLM) -> None:
    padded = tiny_llm.generate(
        input_ids=[[0, 0, *PROMPT]],
        attention_mask=[[0, 0, 1, 1, 1, 1, 1]],
        max_new_tokens=8,
        assistant_model=draft,
    )

    plain = tiny_llm.generate(PROMPT, max_new_tokens=8)
    assert padded.sequences.tolist() == [[0, 0, *PROMPT, *plain.token_ids]]


def test_draft_with_a_shorter_context_helps_as_long_as_it_can(
    tiny_llm: LLM, build_bundle: Any
) -> None:
    bundle = build_bundle(GOLDEN / "models" / "qwen2_draft", max_context=9)
    with LLM(bundle) as short:
        adjust(short, num_assistant_tokens=3, assistant_confidence_threshold=0.0)
        output = tiny_llm.generate(PROMPT, max_new_tokens=20, assistant_model=short)

    assert output.token_ids == tiny_llm.generate(PROMPT, max_new_tokens=20).token_ids
    assert 0 < output.assistance.drafted < 20


def test_stop_string_inside_a_block_ends_the_text_there(text_llm: LLM) -> None:
    plain = text_llm.generate("hello", max_new_tokens=24, eos_token_id=None)
    stop = next(c for c in plain.text[3:] if c.isprintable() and c != "\ufffd")
    before = text_llm.generation_config
    adjust(text_llm, num_assistant_tokens=7, assistant_confidence_threshold=0.0)
    try:
        for settings in ({"stop": stop}, {"stop_strings": [stop]}):
            arguments = {"max_new_tokens": 24, "eos_token_id": None} | settings
            expected = text_llm.generate("hello", **arguments)
            output = text_llm.generate("hello", assistant_model=text_llm, **arguments)
            with text_llm.stream("hello", assistant_model=text_llm, **arguments) as stream:
                pieces = list(stream)

            assert expected.finish_reason == "stop"
            assert (output.text, output.token_ids) == (expected.text, expected.token_ids)
            assert "".join(pieces) == expected.text
    finally:
        text_llm.generation_config = before


def test_streamer_gets_the_prompt_and_then_whole_blocks(tiny_llm: LLM) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.values: list[Any] = []
            self.ended = 0

        def put(self, value: Any) -> None:
            self.values.append(value.copy())

        def end(self) -> None:
            self.ended += 1

    before, recorder = tiny_llm.generation_config, Recorder()
    adjust(tiny_llm, num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    try:
        output = tiny_llm.generate(
            PROMPT, max_new_tokens=8, assistant_model=tiny_llm, streamer=recorder
        )
    finally:
        tiny_llm.generation_config = before

    assert recorder.values[0].tolist() == [PROMPT]
    assert [value.shape for value in recorder.values[1:]] == [(1, 4), (1, 4)]
    assert np.concatenate(recorder.values[1:], axis=1).tolist() == [output.token_ids]
    assert recorder.ended == 1


def test_mixture_accepts_more_than_the_exact_rule(tiny_llm: LLM, draft: LLM) -> None:
    def accepted(**settings: Any) -> int:
        outputs = [
            tiny_llm.generate(
                PROMPT, max_new_tokens=20, assistant_model=draft, seed=seed, **settings
            )
            for seed in range(4)
        ]
        return sum(output.assistance.accepted for output in outputs)

    for mode in ({"do_sample": True}, {"do_sample": False}):
        assert accepted(assistant_ensemble_weight=0.1, **mode) > accepted(**mode)


@pytest.mark.slow
def test_chat_answers_with_the_tiny_draft_are_those_without(
    embedded_llm: LLM, build_bundle: Any, eval_cases: list[dict[str, Any]]
) -> None:
    calls = tokens = 0
    with LLM(build_bundle(DATA / "tiny-qwen2-draft")) as assistant, warnings.catch_warnings():
        warnings.simplefilter("ignore", GenerationConfigWarning)
        for case in eval_cases[::24]:
            prompt = case.get("messages") or case["prompt"]
            arguments = {"do_sample": False, "max_new_tokens": 64}
            plain = embedded_llm.generate(prompt, **arguments)
            assisted = embedded_llm.generate(prompt, assistant_model=assistant, **arguments)

            assert (assisted.text, assisted.token_ids) == (plain.text, plain.token_ids)
            tokens += len(plain.token_ids)
            calls += assisted.assistance.model_calls
    assert calls < 0.5 * tokens
