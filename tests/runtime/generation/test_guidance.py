"""Classifier-free guidance: the unconditional branch is more rows of the same request."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import LLM, CapacityError, RequestError
from qwen_runtime.generation.guidance import negative_prompts
from qwen_runtime.generation_config import GenerationConfigWarning
from qwen_runtime.sampling import log_softmax

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((GOLDEN / "e2e.json").read_text("utf-8"))
    if "guidance_scale" in case["kwargs"]
]
PROMPT = [5, 17, 99, 42, 7]


def test_recorded_runs_are_counted() -> None:
    assert len(CASES) == 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_run_is_reproduced(
    case: dict[str, Any], golden_llm: Callable[[str], LLM]
) -> None:
    output = golden_llm(case["model"]).generate(input_ids=case["input_ids"], **case["kwargs"])

    assert output.sequences.tolist() == case["sequences"]


def test_scores_move_away_from_those_of_the_negative_prompt(tiny_llm: LLM) -> None:
    kept = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
    scale, negative = 2.5, [33, 34, 35]
    guided = tiny_llm.generate(
        PROMPT, guidance_scale=scale, negative_prompt_ids=[negative], output_scores=True, **kept
    )
    away = log_softmax(tiny_llm.generate(negative, **kept).logits[0])
    plain = log_softmax(tiny_llm.generate(PROMPT, **kept).logits[0])

    np.testing.assert_allclose(
        guided.scores[0], scale * (plain - away) + away, rtol=1e-5, atol=1e-5
    )


def test_prompts_of_a_list_take_a_negative_prompt_each(tiny_llm: LLM) -> None:
    prompts, negatives = [PROMPT, [9, 8]], [[33, 34, 35], [1]]
    arguments = {"guidance_scale": 2.0, "max_new_tokens": 6, "do_sample": True, "seed": 2}

    together = tiny_llm.generate(prompts, negative_prompt_ids=negatives, **arguments)
    alone = [
        tiny_llm.generate(prompt, negative_prompt_ids=[negative], **arguments)
        for prompt, negative in zip(prompts, negatives, strict=True)
    ]

    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert tiny_llm._engine.model.num_used_slots == 0


def test_stream_and_generate_are_guided_alike(text_llm: LLM) -> None:
    arguments = {"guidance_scale": 1.8, "negative_prompt_ids": [[4, 5]], "max_new_tokens": 12}

    with text_llm.stream("hello", **arguments) as stream:
        pieces = list(stream)

    assert "".join(pieces) == text_llm.generate("hello", **arguments).text
    assert "".join(pieces) != text_llm.generate("hello", max_new_tokens=12).text


def test_wrong_negative_prompts_are_refused_by_name(tiny_llm: LLM) -> None:
    def call(**arguments: Any) -> Any:
        return tiny_llm.generate(PROMPT, guidance_scale=2.0, max_new_tokens=2, **arguments)

    for wrong, message in [
        ([[1], [2]], r"must have one row per prompt \(1\), got 2"),
        ([[1, 999]], "token ids must be in 0..127"),
        ([], "expected a list of token ids per prompt"),
        ("text", "a list of token ids"),
        (5, "expected a list of token ids per prompt"),
    ]:
        with pytest.raises(RequestError, match=message) as caught:
            call(negative_prompt_ids=wrong)
        assert caught.value.param == "negative_prompt_ids"
    with pytest.raises(RequestError, match="belongs to negative_prompt_ids"):
        call(negative_prompt_attention_mask=[[1]])
    with pytest.raises(RequestError, match="pads must stand on the left"):
        call(negative_prompt_ids=[[1, 2, 3]], negative_prompt_attention_mask=[[1, 0, 1]])
    with pytest.raises(CapacityError, match=r"negative_prompt_ids: .* at most"):
        call(negative_prompt_ids=[[1] * 5000])
    with pytest.raises(RequestError, match="does not work in assisted generation"):
        call(prompt_lookup_num_tokens=2)
    assert tiny_llm._engine.model.num_used_slots == 0


def test_negative_prompt_without_guidance_warns(tiny_llm: LLM) -> None:
    with pytest.warns(GenerationConfigWarning, match="no effect without guidance"):
        output = tiny_llm.generate(PROMPT, negative_prompt_ids=[[1]], max_new_tokens=2)
    assert output.token_ids == tiny_llm.generate(PROMPT, max_new_tokens=2).token_ids


def test_pads_on_the_left_are_left_out() -> None:
    rows = negative_prompts([[0, 0, 7], [4, 5, 6]], [[0, 0, 1], [1, 1, 1]], 128)

    assert [row.tolist() for row in rows] == [[7], [4, 5, 6]]
    assert [row.tolist() for row in negative_prompts([3, 4], None, 128)] == [[3, 4]]


@pytest.mark.slow
def test_guided_modes_equal_transformers(tiny_llm: LLM) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / "qwen2_untied")
    model = model.float().eval()
    source = np.random.default_rng(0)
    modes: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 30},
        {"do_sample": False, "repetition_penalty": 1.2, "eos_token_id": list(range(20))},
        {"do_sample": False, "num_beams": 3},
    ]
    for number, mode in enumerate(modes * 2):
        rows = 1 if number % 2 else 3
        ids = source.integers(1, 128, (rows, 6))
        mask = np.ones_like(ids)
        mask[0, :2] = 0 if rows > 1 else 1
        copies = mode.get("num_beams", 1)
        negative = source.integers(1, 128, (rows, 4)) if number % 3 else None
        arguments = {"guidance_scale": 1.7, "max_new_tokens": 8, "pad_token_id": 0} | mode
        torch.manual_seed(number)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            expected = model.generate(
                torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                negative_prompt_ids=None
                if negative is None
                else torch.from_numpy(negative.repeat(copies, axis=0)),
                **arguments,
            )
        output = tiny_llm.generate(
            ids,
            attention_mask=mask,
            negative_prompt_ids=negative,
            seed=number,
            rng="torch",
            **arguments,
        )
        assert output.sequences.tolist() == expected.tolist(), mode
