"""Prompt lookup: candidates from the text itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime import LLM, RequestError
from qwen_runtime.generation.candidates import look_up
from qwen_runtime.sampling import LogitsProcessorList, SuppressTokensLogitsProcessor

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((GOLDEN / "e2e.json").read_text("utf-8"))
    if "prompt_lookup_num_tokens" in case["kwargs"]
]
LOOKUPS: list[dict[str, Any]] = json.loads((GOLDEN / "speculative.json").read_text("utf-8"))[
    "prompt_lookup"
]
REPEATING = [21, 22, 23, 24] * 3


def test_recorded_runs_and_lookups_are_counted() -> None:
    assert (len(CASES), len(LOOKUPS)) == (2, 9)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_run_is_reproduced(
    case: dict[str, Any], golden_llm: Callable[[str], LLM]
) -> None:
    output = golden_llm(case["model"]).generate(input_ids=case["input_ids"], **case["kwargs"])

    assert output.sequences.tolist() == case["sequences"]
    assert output.outputs[0].assistance.draft_calls == 0


@pytest.mark.parametrize("case", LOOKUPS, ids=lambda case: str(case["input_ids"]))
def test_recorded_lookup_is_reproduced(case: dict[str, Any]) -> None:
    ids = np.array(case["input_ids"])
    # The check brings a token of its own, which needs room too.
    room = min(case["num_output_tokens"], case["max_length"] - len(ids) - 1)

    guess = look_up(ids, room, case["max_matching_ngram_size"], eos_token_ids=case["eos"] or ())

    assert [*case["input_ids"], *guess.tolist()] == case["candidates"]


def test_forbidden_tokens_end_a_guess_or_send_it_to_another_place() -> None:
    ids = np.array([1, 2, 3, 4, 1, 2, 5, 6, 1, 2])

    def guess(*forbidden: int) -> list[int]:
        processors = LogitsProcessorList([SuppressTokensLogitsProcessor(list(forbidden))])
        return look_up(ids, 3, 2, vocab_size=10, processors=processors).tolist()  # type: ignore[no-any-return]

    assert look_up(ids, 3, 2).tolist() == [3, 4, 1]
    assert guess(4) == [3]
    assert guess(3) == [5, 6, 1]
    assert guess(3, 5) == []


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    num_tokens=st.integers(1, 8),
    size=st.integers(1, 4),
)
def test_guess_continues_an_earlier_occurrence_of_the_end(
    ids: list[int], num_tokens: int, size: int
) -> None:
    guess = look_up(np.array(ids), num_tokens, size).tolist()

    assert len(guess) <= num_tokens
    if guess:
        assert any(
            ids[start : start + n] == ids[-n:] and ids[start + n :][: len(guess)] == guess
            for n in range(1, size + 1)
            for start in range(len(ids) - n)
        )
    else:
        assert ids[-1] not in ids[:-1]


@pytest.mark.parametrize("sampled", [{}, {"seed": 4}, {"seed": 4, "rng": "torch"}])
def test_answer_is_that_of_plain_decoding(sampled: dict[str, Any], tiny_llm: LLM) -> None:
    arguments = {"max_new_tokens": 24, "do_sample": bool(sampled)} | sampled
    if sampled.get("rng") == "torch":
        # There the draws of refused candidates are passed, as in transformers.
        arguments["max_new_tokens"] = 1
    for prompt in (REPEATING, [7], [9] * 6):
        plain = (
            tiny_llm.generate(prompt, temperature=0.5, **arguments)
            if sampled
            else (tiny_llm.generate(prompt, **arguments))
        )
        looked = tiny_llm.generate(
            prompt,
            prompt_lookup_num_tokens=4,
            **arguments,
            **({"temperature": 0.5} if sampled else {}),
        )

        assert looked.token_ids == plain.token_ids
        if arguments["max_new_tokens"] > 1:
            assert looked.assistance.model_calls <= len(plain.token_ids)


def test_rows_of_a_batch_are_refused(tiny_llm: LLM) -> None:
    with pytest.raises(RequestError, match="takes one row, got a batch of 2"):
        tiny_llm.generate(np.array([[1, 2], [3, 4]]), prompt_lookup_num_tokens=3, max_new_tokens=2)
    with pytest.raises(RequestError, match="num_return_sequences must be 1 with prompt lookup"):
        tiny_llm.generate(
            [1, 2],
            prompt_lookup_num_tokens=3,
            max_new_tokens=2,
            do_sample=True,
            num_return_sequences=2,
        )
    assert tiny_llm._engine.model.num_used_slots == 0


@pytest.mark.slow
def test_sampled_lookup_equals_transformers(tiny_llm: LLM) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / "qwen2_untied")
    model = model.float().eval()
    arguments = {"do_sample": True, "temperature": 0.6, "top_k": 5, "max_new_tokens": 20}
    for seed in range(6):
        torch.manual_seed(seed)
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([REPEATING]), prompt_lookup_num_tokens=4, pad_token_id=0, **arguments
            )
        output = tiny_llm.generate(
            input_ids=[REPEATING], prompt_lookup_num_tokens=4, seed=seed, rng="torch", **arguments
        )
        assert output.sequences.tolist() == expected.tolist()
