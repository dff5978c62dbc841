"""Assisted generation that is asked for wrongly, fails, is cancelled, or meets other threads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import LLM, BackendError, RequestError
from qwen_runtime.generation_config import GenerationConfigWarning

PROMPT = [5, 17, 99, 42, 7]


def adjust(llm: LLM, **settings: Any) -> None:
    llm.generation_config = dataclasses.replace(llm.generation_config, **settings)


def assert_no_slot_is_held(*llms: LLM) -> None:
    assert [llm._engine.model.num_used_slots for llm in llms] == [0] * len(llms)


def test_wrong_arguments_are_refused_by_name(tiny_llm: LLM, draft: LLM, text_llm: LLM) -> None:
    ids = np.array([PROMPT, PROMPT])
    few = {"max_new_tokens": 3}
    wrong: list[tuple[str, str, Any]] = [
        ("assistant_model", "must be an LLM, got str", {"assistant_model": "draft"}),
        (
            "assistant_model",
            r"must have the model's 128 logits, got \d+",
            {"assistant_model": text_llm},
        ),
        (
            "assistant_model",
            "exclude each other",
            {"assistant_model": draft, "prompt_lookup_num_tokens": 3},
        ),
        (
            "num_return_sequences",
            "must be 1 in assisted generation",
            {"assistant_model": draft, "do_sample": True, "num_return_sequences": 2},
        ),
        (
            "guidance_scale",
            "does not work in assisted generation",
            {"assistant_model": draft, "guidance_scale": 2.0},
        ),
    ]
    for param, message, arguments in wrong:
        with pytest.raises(RequestError, match=message) as caught:
            tiny_llm.generate(PROMPT, **few, **arguments)
        assert caught.value.param == param
    with pytest.raises(RequestError, match="takes one row, got a batch of 2"):
        tiny_llm.generate(ids, assistant_model=draft, **few)
    assert_no_slot_is_held(tiny_llm, draft)


def test_other_tokens_under_the_same_ids_are_another_vocabulary(
    text_llm: LLM, text_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(text_bundle) as other:
        assert other.tokenizer is not None
        tokens = dict(other.tokenizer.vocabulary_bytes())
        tokens[5], tokens[6] = tokens[6], tokens[5]
        monkeypatch.setattr(other.tokenizer, "vocabulary_bytes", lambda: tokens)

        with pytest.raises(RequestError, match="with other tokens"):
            text_llm.generate("hello", assistant_model=other, max_new_tokens=2)


def test_what_has_no_effect_warns(tiny_llm: LLM, draft: LLM) -> None:
    plain = tiny_llm.generate(PROMPT, num_beams=2, max_new_tokens=3)
    with pytest.warns(GenerationConfigWarning, match="no effect in beam search"):
        beams = tiny_llm.generate(PROMPT, num_beams=2, max_new_tokens=3, assistant_model=draft)
    assert beams.token_ids == plain.token_ids
    with pytest.warns(GenerationConfigWarning, match="num_assistant_tokens are read from"):
        tiny_llm.generate(PROMPT, max_new_tokens=3, assistant_model=draft, num_assistant_tokens=2)
    with pytest.warns(GenerationConfigWarning, match="no effect without assistant_model"):
        tiny_llm.generate(PROMPT, max_new_tokens=3, assistant_ensemble_weight=0.5)


def test_errors_and_cancellation_free_the_slots_of_both_models(
    tiny_llm: LLM, text_llm: LLM, draft: LLM
) -> None:
    def fail(ids: Any, scores: Any) -> Any:
        if ids.shape[1] == 8:
            raise RuntimeError("from the processor")
        return scores

    with pytest.raises(RuntimeError, match="from the processor"):
        tiny_llm.generate(PROMPT, max_new_tokens=9, assistant_model=draft, logits_processor=[fail])
    assert_no_slot_is_held(tiny_llm, draft)

    with text_llm.stream("hello", max_new_tokens=30, assistant_model=text_llm) as stream:
        next(stream)
        assert text_llm._engine.model.num_used_slots == 2
    assert stream.output.finish_reason == "cancelled"
    assert_no_slot_is_held(text_llm)
    assert tiny_llm.generate(PROMPT, max_new_tokens=2, assistant_model=draft).token_ids


def test_closed_draft_is_an_error_and_the_model_stays_usable(
    tiny_llm: LLM, golden_bundle: Callable[[str], Path]
) -> None:
    assistant = LLM(golden_bundle("qwen2_draft"))
    assistant.close()

    with pytest.raises(BackendError, match="the LLM is closed"):
        tiny_llm.generate(PROMPT, max_new_tokens=3, assistant_model=assistant)

    assert_no_slot_is_held(tiny_llm)
    assert tiny_llm.generate(PROMPT, max_new_tokens=3).token_ids


def test_models_that_draft_for_each_other_in_threads_do_not_wait_forever(
    tiny_llm: LLM, draft: LLM
) -> None:
    adjust(draft, num_assistant_tokens=3)
    before = tiny_llm.generation_config
    adjust(tiny_llm, num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    pairs = [(tiny_llm, draft), (draft, tiny_llm), (draft, None), (tiny_llm, None)]
    expected = [llm.generate(PROMPT, max_new_tokens=12).token_ids for llm, _ in pairs]
    seen: list[list[Any]] = [[] for _ in pairs]

    def work(number: int) -> None:
        llm, assistant = pairs[number]
        for _ in range(6):
            output = llm.generate(PROMPT, max_new_tokens=12, assistant_model=assistant)
            seen[number].append(output.token_ids)

    threads = [
        threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(pairs))
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        tiny_llm.generation_config = before
    assert seen == [[tokens] * 6 for tokens in expected]
    assert_no_slot_is_held(tiny_llm, draft)
