"""Streams: pieces as they come, and what happens when they are left."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_runtime import LLM
from qwen_runtime.text import TextIteratorStreamer

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}
FOREVER: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": None}
"""Settings under which an answer does not end by itself."""


@pytest.fixture(autouse=True)
def nothing_is_left_behind(text_llm: LLM) -> Iterator[None]:
    yield
    assert text_llm._engine.num_requests == 0
    assert text_llm._engine.model.num_used_slots == 0


def test_pieces_join_to_the_text_of_generate(text_llm: LLM) -> None:
    whole = text_llm.generate("Hello", **GREEDY)

    stream = text_llm.stream("Hello", **GREEDY)
    pieces = list(stream)

    assert "".join(pieces) == whole.text
    assert all(pieces)
    assert len(pieces) > 1
    assert stream.output == whole
    assert stream.token_ids == whole.token_ids


@given(
    seed=st.integers(0, 2**32),
    stop=st.lists(st.text("abcdeé _\n", min_size=1, max_size=2), max_size=3),
)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_pieces_join_to_the_text_of_any_sampled_run(
    text_llm: LLM, seed: int, stop: list[str]
) -> None:
    # Random weights and a high temperature give broken UTF-8 and special tokens, too.
    chosen: dict[str, Any] = {
        "do_sample": True,
        "temperature": 2.0,
        "top_k": 0,
        "seed": seed,
        "max_new_tokens": 30,
        "stop": stop or None,
    }
    whole = text_llm.generate("Hello", **chosen)

    stream = text_llm.stream("Hello", **chosen)
    pieces = list(stream)

    assert "".join(pieces) == whole.text
    assert all(pieces)
    assert stream.output == whole


def test_pieces_come_while_the_model_runs(text_llm: LLM) -> None:
    calls: list[int] = []

    def watch(ids: Any, scores: Any) -> bool:
        calls.append(ids.shape[1])
        return False

    stream = text_llm.stream("Hello", stopping_criteria=[watch], **GREEDY)
    assert calls == []
    next(stream)

    assert 0 < len(calls) < 24
    assert len(stream.token_ids) == len(calls)
    list(stream)
    assert len(calls) == len(stream.token_ids)


def test_closing_a_stream_cancels_it_and_frees_its_slot(text_llm: LLM) -> None:
    stream = text_llm.stream("Hello", **GREEDY)
    next(stream)
    assert text_llm._engine.model.num_used_slots == 1

    stream.close()
    stream.close()

    assert text_llm._engine.model.num_used_slots == 0
    assert stream.output.finish_reason == "cancelled"
    assert 0 < len(stream.output.token_ids) < 24
    assert list(stream) == []


def test_leaving_the_with_block_cancels(text_llm: LLM) -> None:
    with text_llm.stream("Hello", **GREEDY) as stream:
        for _ in stream:
            break

    assert stream.output.finish_reason == "cancelled"


def test_stream_that_was_never_read_holds_nothing(text_llm: LLM) -> None:
    stream = text_llm.stream("Hello", **GREEDY)
    assert text_llm._engine.num_requests == 0

    stream.close()

    assert stream.output.finish_reason == "cancelled"
    assert stream.output.token_ids == []


def test_forgotten_stream_frees_its_slot(text_llm: LLM) -> None:
    stream = text_llm.stream("Hello", **GREEDY)
    next(stream)
    del stream

    assert text_llm._engine.model.num_used_slots == 0


def test_stream_collected_in_the_middle_of_a_step_does_no_harm(text_llm: LLM) -> None:
    forgotten: list[Any] = [text_llm.stream("Hello", **GREEDY)]
    next(forgotten[0])

    forgotten.append(forgotten)  # a cycle: only the collector finds it

    def drop(ids: Any, scores: Any) -> Any:
        # Inside the engine's step, where its lock is held.
        nonlocal forgotten
        forgotten = []
        gc.collect()
        return scores

    text = text_llm.generate("a", logits_processor=[drop], **GREEDY).text

    assert text == text_llm.generate("a", **GREEDY).text


def test_finished_stream_stays_finished(text_llm: LLM) -> None:
    stream = text_llm.stream("Hello", **GREEDY)
    list(stream)
    output = stream.output

    stream.close()

    assert stream.output == output
    assert output.finish_reason in ("length", "stop")


def test_two_streams_read_in_turns_get_their_own_text(text_llm: LLM) -> None:
    expected = [text_llm.generate(prompt, **GREEDY).text for prompt in ("Hello", "a b")]
    streams = [text_llm.stream(prompt, **GREEDY) for prompt in ("Hello", "a b")]
    texts = ["", ""]

    for _ in range(40):
        for index, stream in enumerate(streams):
            texts[index] += next(stream, "")

    assert texts == expected


def test_generating_while_a_stream_is_half_read_disturbs_neither(text_llm: LLM) -> None:
    expected = text_llm.generate("Hello", **GREEDY).text
    stream = text_llm.stream("Hello", **GREEDY)
    text = next(stream)

    other = text_llm.generate("a b", **GREEDY)

    assert text + "".join(stream) == expected
    assert other == text_llm.generate("a b", **GREEDY)


def test_stream_gives_log_probabilities_as_it_goes(text_llm: LLM) -> None:
    whole = text_llm.generate("Hello", logprobs=True, top_logprobs=2, **GREEDY)

    stream = text_llm.stream("Hello", logprobs=True, top_logprobs=2, **GREEDY)
    next(stream)
    assert stream.logprobs == whole.logprobs[: len(stream.token_ids)]
    list(stream)

    assert stream.logprobs == whole.logprobs


def test_error_of_a_callback_reaches_the_reader(text_llm: LLM) -> None:
    def fail(ids: Any, scores: Any) -> Any:
        if ids.shape[1] > 6:
            raise OverflowError("too long for me")
        return scores

    stream = text_llm.stream("Hello", logits_processor=[fail], **GREEDY)

    with pytest.raises(OverflowError, match="too long for me"):
        list(stream)
    assert list(stream) == []


def test_streamer_of_transformers_kind_gets_the_same_text(text_llm: LLM) -> None:
    streamer = TextIteratorStreamer(text_llm.tokenizer, skip_prompt=True, skip_special_tokens=True)

    output = text_llm.generate("Hello", streamer=streamer, **GREEDY)

    assert "".join(streamer) == output.text


def test_stream_is_cancelled_from_another_thread(text_llm: LLM) -> None:
    stream = text_llm.stream("Hello", **FOREVER)
    pieces = [next(stream)]
    other = threading.Thread(target=stream.cancel)
    other.start()
    other.join()
    pieces += stream

    assert stream.output.finish_reason == "cancelled"
    assert "".join(pieces) == stream.output.text
    assert len(stream.output.token_ids) < 40


def test_generate_is_cancelled_from_another_thread(text_llm: LLM) -> None:
    cancel = threading.Event()

    def at_the_fifth_token(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 10:  # two prompts
            other = threading.Thread(target=cancel.set)
            other.start()
            other.join()
        return scores

    calls = 0
    outputs = text_llm.generate(
        ["Hello", "the"], logits_processor=[at_the_fifth_token], cancel=cancel, **FOREVER
    )

    assert {output.finish_reason for output in outputs} == {"cancelled"}
    assert {len(output.token_ids) for output in outputs} == {5}


@pytest.mark.parametrize("of_a_draft", [False, True])
def test_stream_collected_inside_of_the_models_lock_does_not_wait_for_it(
    text_llm: LLM, monkeypatch: pytest.MonkeyPatch, of_a_draft: bool
) -> None:
    expected = text_llm.generate("a", **GREEDY).text
    forgotten: list[Any] = [text_llm.stream("Hello", **GREEDY)]
    next(forgotten[0])
    forgotten.append(forgotten)
    runner = text_llm._engine.model._runner
    truncate, texts = runner.truncate, []

    def collecting(slot: int, length: int) -> None:
        # In Model.release, outside of any step: the collector comes when it likes.
        nonlocal forgotten
        if slot == 1 and length == 0 < runner._cache.lengths[slot]:
            forgotten = []
            gc.collect()
        truncate(slot, length)

    def ask() -> None:
        if of_a_draft:
            with LLM(text_llm.bundle, threads=1) as larger:
                texts.append(larger.generate("a", assistant_model=text_llm, **GREEDY).text)
        else:
            with text_llm.stream("a", **GREEDY) as other:
                next(other)
            texts.append(text_llm.generate("a", **GREEDY).text)

    monkeypatch.setattr(runner, "truncate", collecting)
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=30)

    assert texts == [expected]
    text_llm.generate("a", **GREEDY)  # retires what was only marked


def test_time_limit_begins_when_a_stream_is_first_read(text_llm: LLM) -> None:
    stream = text_llm.stream("Hello", max_time=5.0, **GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        later = time.monotonic() + 100
        patch.setattr("qwen_runtime.generation.stopping.time.monotonic", lambda: later)
        list(stream)

    assert len(stream.token_ids) > 1


def test_chunks_match_text_with_token_ids_and_logprobs(text_llm: LLM) -> None:
    settings = {**GREEDY, "logprobs": True, "top_logprobs": 2}
    whole = text_llm.generate("Hello", **settings)

    stream = text_llm.stream("Hello", **settings)
    chunks = list(stream.chunks())

    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [i for chunk in chunks for i in chunk.token_ids] == whole.token_ids
    assert [item for chunk in chunks for item in chunk.logprobs] == whole.logprobs
    assert all([item.token_id for item in chunk.logprobs] == chunk.token_ids for chunk in chunks)
    assert len(chunks) > len([chunk for chunk in chunks if chunk.text])
