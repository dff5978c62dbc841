"""Prompts that begin alike, on a real model: fewer tokens computed, the same bits out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_export.bundle import BuildOptions, build
from qwen_runtime import LLM, RequestError, RequestOutput

SYSTEM = "You are a helpful assistant. Answer briefly, in one sentence, and never guess. "
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
WITH_LOGITS: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def reusing(embedded_bundle: Path) -> Iterator[LLM]:
    """The embedded model, with nothing in its cache."""
    with LLM(embedded_bundle, threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(embedded_bundle: Path) -> Iterator[LLM]:
    """The embedded model without reuse."""
    with LLM(embedded_bundle, threads=1, prefix_cache_slots=0) as llm:
        yield llm


def assert_same(ours: RequestOutput, fresh: RequestOutput) -> None:
    assert fresh.num_cached_tokens == 0
    assert ours == fresh if ours.logits is None else ours.token_ids == fresh.token_ids
    for mine, theirs in zip(ours.logits or [], fresh.logits or [], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def common(first: list[int], second: list[int]) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )


def test_conversation_computes_only_the_last_answer_and_what_follows(
    reusing: LLM, plain: LLM
) -> None:
    messages = [{"role": "system", "content": SYSTEM * 3}, {"role": "user", "content": "Hello"}]
    before: list[int] = []
    for question in ("What is 3+4?", "And 5+5?", "The capital of France?"):
        ours, fresh = (llm.generate(messages, **GREEDY, **WITH_LOGITS) for llm in (reusing, plain))
        assert_same(ours, fresh)
        assert ours.num_cached_tokens == common(before, ours.prompt_token_ids) // 2 * 2
        before = ours.prompt_token_ids
        messages += [
            {"role": "assistant", "content": ours.text},
            {"role": "user", "content": question},
        ]
    assert len(before) > 60


def test_shared_beginning_is_computed_once_for_a_list(reusing: LLM, plain: LLM) -> None:
    prompts = [SYSTEM * 2 + question for question in ("Who?", "What is it?", "When was that?")]

    outputs = reusing.generate(prompts, **GREEDY, **WITH_LOGITS)

    for ours, fresh in zip(outputs, plain.generate(prompts, **GREEDY, **WITH_LOGITS), strict=True):
        assert_same(ours, fresh)
    shared = [common(outputs[0].prompt_token_ids, out.prompt_token_ids) for out in outputs]
    assert [out.num_cached_tokens for out in outputs] == [0, *(n // 2 * 2 for n in shared[1:])]


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "seed": 3},
        {"do_sample": True, "seed": 3, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=str,
)
def test_every_mode_gives_the_same_with_a_cached_beginning(
    reusing: LLM, plain: LLM, arguments: dict[str, Any]
) -> None:
    arguments = {**GREEDY, **arguments}
    reusing.generate(SYSTEM, max_new_tokens=3)
    prompt = SYSTEM + "What is 2 + 2?"

    outputs = [llm.generate(prompt, **arguments, **WITH_LOGITS) for llm in (reusing, plain)]

    ours, fresh = (out if isinstance(out, list) else [out] for out in outputs)
    for one, other in zip(ours, fresh, strict=True):
        assert_same(one, other)
        assert one.num_cached_tokens >= 12


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_give_the_same_wherever_the_beginning_ends(
    tmp_path: Path, precision: str
) -> None:
    folder = tmp_path / "bundle"
    bundle = build(None, folder, BuildOptions(precision=precision, verify=False)).path
    rng = np.random.default_rng(0)
    with LLM(bundle, threads=1) as reusing, LLM(bundle, threads=1, prefix_cache_slots=0) as plain:
        for shared in (20, 33, 513):
            head = rng.integers(0, 4000, shared).tolist()
            reusing.generate(head, **GREEDY)
            for new in (1, 2, 5, 40):
                prompt = head + rng.integers(0, 4000, new).tolist()
                ours, fresh = (
                    llm.generate(prompt, **GREEDY, **WITH_LOGITS) for llm in (reusing, plain)
                )
                assert_same(ours, fresh)
                assert ours.num_cached_tokens in (shared - 2, shared - 1, shared)


def test_draft_reuses_its_own_cache(reusing: LLM, plain: LLM, draft_bundle: Path) -> None:
    with LLM(draft_bundle, threads=1) as draft:
        for question in ("What is 2 + 2?", "What is 3 + 9?"):
            ours = reusing.generate(SYSTEM + question, assistant_model=draft, **GREEDY)
            assert ours.token_ids == plain.generate(SYSTEM + question, **GREEDY).token_ids
        assert ours.num_cached_tokens >= 12
        slots = draft._engine.model._prefixes
        assert common(slots.tokens(0).tolist(), ours.prompt_token_ids) >= 12


def test_negative_prompts_of_all_rows_are_computed_once(reusing: LLM, plain: LLM) -> None:
    arguments: dict[str, Any] = {
        "guidance_scale": 2.0,
        "negative_prompt_ids": reusing.encode(SYSTEM + "Be rude."),
        "do_sample": True,
        "num_return_sequences": 3,
        "seed": 5,
        "max_new_tokens": 6,
    }
    with counting(reusing) as computed:
        ours = reusing.generate("Hello there, how are you today?", **arguments)

    assert ours == plain.generate("Hello there, how are you today?", **arguments)
    assert sum(computed) < 2 * len(arguments["negative_prompt_ids"])


def test_padded_batch_reuses_row_by_row_and_processors_see_all_of_it(
    reusing: LLM, plain: LLM
) -> None:
    long, short = reusing.encode(SYSTEM + "Is it so? Why?"), reusing.encode(SYSTEM + "Why?")
    pads = len(long) - len(short)
    ids = np.array([long, [0] * pads + short])
    mask = np.array([[1] * len(long), [0] * pads + [1] * len(short)])
    seen: list[np.ndarray] = []

    def look(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append(ids.copy())
        return scores

    reusing.generate(SYSTEM, max_new_tokens=2)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    ours = reusing.generate(**arguments, logits_processor=[look])

    np.testing.assert_array_equal(ours.sequences, plain.generate(**arguments).sequences)
    assert all(output.num_cached_tokens >= 12 for output in ours.outputs)
    np.testing.assert_array_equal(seen[0], ids)


def test_stream_says_what_was_cached_and_a_closed_one_leaves_its_prompt(
    reusing: LLM, plain: LLM
) -> None:
    def ask(question: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]

    with reusing.stream(ask("Hello"), **GREEDY) as first:
        next(first)
    second = reusing.stream(ask("Hi there"), **GREEDY)

    assert "".join(second) == plain.generate(ask("Hi there"), **GREEDY).text
    assert second.output.num_cached_tokens >= 12


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),  # how often the beginning is repeated
            st.text("abc 12?", max_size=12),
            st.sampled_from([{}, {"num_beams": 2}, {"do_sample": True, "seed": 1}]),
            st.booleans(),  # whether it is cancelled at once
        ),
        min_size=2,
        max_size=5,
    )
)
@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_answers_do_not_depend_on_what_was_asked_before(
    reusing: LLM, plain: LLM, asked: list[Any]
) -> None:
    for times, text, arguments, cancelled in asked:
        prompt = SYSTEM * times + "Say " + text
        cancel = threading.Event()
        if cancelled:
            cancel.set()
        arguments = {**GREEDY, "max_new_tokens": 4, **arguments}
        ours = reusing.generate(prompt, cancel=cancel, **arguments, **WITH_LOGITS)
        if not cancelled:
            assert_same(ours, plain.generate(prompt, **arguments, **WITH_LOGITS))


@pytest.mark.parametrize("count", [-1, True, 1.5, None, "2"])
def test_number_of_kept_slots_must_be_a_count(embedded_bundle: Path, count: Any) -> None:
    with pytest.raises(RequestError, match=r"prefix_cache_slots must be an integer >= 0 .*got"):
        LLM(embedded_bundle, prefix_cache_slots=count)


@contextmanager
def counting(llm: LLM) -> Iterator[list[int]]:
    """Tokens of every prefill call, while it is open."""
    runner, computed = llm._engine.model._runner, list[int]()
    original = runner.prefill

    def prefill(slots: Any, tokens: Any, past: Any, want: Any) -> Any:
        computed.append(sum(map(len, tokens)))
        return original(slots, tokens, past, want)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "prefill", prefill)
        yield computed
