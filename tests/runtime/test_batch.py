"""Many prompts at once answer as each alone, whoever asks and however they are padded."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_runtime import LLM
from qwen_runtime import cache as cache_module
from qwen_runtime.backends import onnxruntime as backend

VOCAB = 128
prompts = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=6
)


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of one call that do not look across rows."""
    chosen: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 12))}
    if draw(st.booleans()):
        chosen |= {
            "do_sample": True,
            "seed": draw(st.integers(0, 2**64 - 1)),
            "temperature": draw(st.floats(0.5, 2.0)),
            "top_k": draw(st.sampled_from([0, 5, 50])),
            "rng": draw(st.sampled_from(["default", "torch"])),
        }
    if draw(st.booleans()):
        chosen["eos_token_id"] = draw(
            st.lists(st.integers(0, VOCAB - 1), min_size=10, max_size=40)
        )
    if draw(st.booleans()):
        chosen["repetition_penalty"] = draw(st.floats(0.8, 1.5))
    return chosen


@given(prompts=prompts, chosen=arguments())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_list_of_prompts_answers_as_each_alone(
    tiny_llm: LLM, prompts: list[list[int]], chosen: dict[str, Any]
) -> None:
    alone = [tiny_llm.generate(prompt, **chosen) for prompt in prompts]

    together = tiny_llm.generate(prompts, **chosen)
    reverse = tiny_llm.generate(prompts[::-1], **chosen)

    assert together == alone
    assert reverse == alone[::-1]
    assert tiny_llm._engine.model.num_used_slots == 0


@given(prompts=prompts, eos=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=40))
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_left_padded_batch_answers_as_each_row_alone(
    tiny_llm: LLM, prompts: list[list[int]], eos: list[int]
) -> None:
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    output = tiny_llm.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, eos_token_id=eos
    )

    alone = [tiny_llm.generate(prompt, max_new_tokens=8, eos_token_id=eos) for prompt in prompts]
    assert [row.token_ids for row in output.outputs] == [row.token_ids for row in alone]
    assert [row.finish_reason for row in output.outputs] == [row.finish_reason for row in alone]
    longest = max(len(row.token_ids) for row in alone)
    for row, expected in zip(output.sequences[:, width:].tolist(), alone, strict=True):
        pads = longest - len(expected.token_ids)
        assert row == expected.token_ids + [eos[0]] * pads


def test_row_that_ended_is_not_run_any_further(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 17, 99, 42, 7], [1, 2, 3]]
    first = tiny_llm.generate(prompts[0], max_new_tokens=1).token_ids[0]
    runner = tiny_llm._engine.model._runner
    rows: list[int] = []
    decode = runner.decode

    def count(slots: Any, tokens: Any) -> Any:
        rows.append(len(slots))
        return decode(slots, tokens)

    monkeypatch.setattr(runner, "decode", count)
    outputs = tiny_llm.generate(prompts, max_new_tokens=6, eos_token_id=first)

    assert outputs[0].token_ids == [first]
    assert len(outputs[1].token_ids) == 6
    assert rows == [1] * 5


def test_many_more_prompts_than_one_call_takes(tiny_llm: LLM, rng: np.random.Generator) -> None:
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 30)).tolist() for _ in range(100)]

    together = tiny_llm.generate(prompts, max_new_tokens=4)

    assert together == [tiny_llm.generate(prompt, max_new_tokens=4) for prompt in prompts]


def test_growing_midway_gives_the_same_tokens(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 17, 99], [1, 2, 3, 4, 5, 6, 7]]
    expected = tiny_llm.generate(prompts, max_new_tokens=40)
    monkeypatch.setattr(cache_module, "GROWTH_STEP", 4)

    with LLM(tiny_llm.bundle, threads=1) as llm:
        grown = llm.generate(prompts, max_new_tokens=40)
        # The longest row: 7 + 40 tokens, the last of which is not fed.
        assert llm._engine.model._runner.capacity == 48

    assert grown == expected


def test_prompt_in_chunks_gives_the_same_tokens(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    prompts = rng.integers(0, VOCAB, (3, 30)).tolist()
    expected = tiny_llm.generate(prompts, max_new_tokens=10)
    monkeypatch.setattr(backend, "PREFILL_CHUNK", 7)

    assert tiny_llm.generate(prompts, max_new_tokens=10) == expected


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 5, "temperature": 0.9}])
def test_threads_share_the_model_and_get_their_own_answers(
    text_llm: LLM, sampling: dict[str, Any]
) -> None:
    prompts = ["Hello", "a b c", "x", "1 2 3", "zz", "The end"]
    chosen = {"max_new_tokens": 16, **({"do_sample": False} | sampling)}
    expected = [text_llm.generate(prompt, **chosen) for prompt in prompts]
    answers: dict[int, Any] = {}
    barrier = threading.Barrier(len(prompts))

    def ask(index: int) -> None:
        barrier.wait()
        if index % 2:
            stream = text_llm.stream(prompts[index], **chosen)
            assert "".join(stream) == expected[index].text
            answers[index] = stream.output
        else:
            answers[index] = text_llm.generate(prompts[index], **chosen)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert [answers[index] for index in range(len(prompts))] == expected
    assert text_llm._engine.num_requests == 0
    assert text_llm._engine.model.num_used_slots == 0


def test_real_model_answers_a_list_of_chats_as_each_alone(embedded_llm: LLM) -> None:
    chats = [
        [{"role": "user", "content": question}]
        for question in ("What is 17 + 25?", "Hello!", "904与701的和是多少", "Spell house.")
    ]
    chosen: dict[str, Any] = {"max_new_tokens": 30, "seed": 3}  # sampled, as the bundle says

    assert embedded_llm.generate(chats, **chosen) == [
        embedded_llm.generate(chat, **chosen) for chat in chats
    ]
