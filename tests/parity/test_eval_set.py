"""The embedded model's held-out questions: the bundle answers like PyTorch, answer by answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qwen_export.bundle import BuildOptions, build, embedded_model
from qwen_runtime import LLM

STOP, PAD = 4095, 4093
GROUP = 64
FORWARD_GROUP = 16
DOCUMENTED_ACCURACY = 98.8  # per cent, fp32, as the model was trained and evaluated
TIE_FACTOR = 10  # a departure counts as a tie where the top-2 gap is below this x the difference

Case = dict[str, Any]


@pytest.fixture(scope="module")
def reference() -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        embedded_model(), dtype=torch.float32, local_files_only=True
    )
    return model.eval()


def prompt_ids(llm: LLM, case: Case) -> list[int]:
    assert llm.tokenizer is not None
    text = case["prompt"] if "prompt" in case else llm._inputs.render(case["messages"])
    return llm.tokenizer.encode(text)


def limit_of(llm: LLM, case: Case) -> int:
    """Room to give a wrong answer that is longer than the right one."""
    assert llm.tokenizer is not None
    if case["check"]["kind"] == "story":
        return 320
    return len(llm.tokenizer.encode(case["answer"])) * 5 // 4 + 12


def groups(llm: LLM, cases: list[Case]) -> Iterator[tuple[list[int], int]]:
    """Indices of cases with answers of like length, and how many tokens they may have."""
    order = sorted(range(len(cases)), key=lambda i: limit_of(llm, cases[i]))
    for start in range(0, len(order), GROUP):
        group = order[start : start + GROUP]
        yield group, max(limit_of(llm, cases[i]) for i in group)


@torch.inference_mode()
def departures(
    reference: Any, prompts: list[list[int]], answers: list[list[int]]
) -> dict[int, tuple[int, Any]]:
    """Where transformers' greedy search would leave our answers.

    Greedy search takes the best token after every prefix, so its answer is ours exactly when each
    of our tokens is the best one after those before it: one forward pass tells for all of them.

    Returns:
        By index of the prompt: the first token that differs, and transformers' logits there.
    """
    found: dict[int, tuple[int, Any]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    for start in range(0, len(order), FORWARD_GROUP):
        group = order[start : start + FORWARD_GROUP]
        rows = [prompts[i] + answers[i] for i in group]
        width = max(map(len, rows))
        # Pads on the right change nothing before them.
        logits = reference(torch.tensor([row + [PAD] * (width - len(row)) for row in rows])).logits
        for i, row in zip(group, logits, strict=True):
            first = len(prompts[i]) - 1
            wanted = row[first : first + len(answers[i])]
            wrong = (wanted.argmax(-1) != torch.tensor(answers[i])).nonzero()
            if len(wrong):
                found[i] = (int(wrong[0]), wanted[int(wrong[0])].numpy().copy())
    return found


def passes(llm: LLM, case: Case, token_ids: list[int]) -> bool:
    """Whether an answer is whole and right; an open story, whether it is about what was asked."""
    assert llm.tokenizer is not None
    if not token_ids or token_ids[-1] not in (STOP, PAD):
        return False
    text = llm.tokenizer.decode(token_ids, skip_special_tokens=True)
    if case["check"]["kind"] == "exact":
        return bool(text == case["answer"])
    whole = case.get("prompt", "") + text
    return all(word in whole for word in case["check"]["want"].values()) and (
        len(re.findall(r"[.!?。]", whole)) >= 3
    )


def is_tie(llm: LLM, prefix: list[int], expected: Any) -> bool:
    """Whether the reference's two best tokens are as good as equal there."""
    output = llm.generate(
        prefix, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    second, first = np.sort(expected)[-2:]
    return bool(first - second < TIE_FACTOR * np.abs(output.logits[0] - expected).max())


def answers_of(llm: LLM, cases: list[Case], prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers to every question."""
    answers: list[list[int]] = [[]] * len(prompts)
    for group, limit in groups(llm, cases):
        outputs = llm.generate(
            [prompts[i] for i in group],
            max_new_tokens=limit,
            do_sample=False,
            repetition_penalty=1.0,
        )
        for i, output in zip(group, outputs, strict=True):
            answers[i] = output.token_ids
            assert answers[i][-1] in (STOP, PAD) or len(answers[i]) == limit
    return answers


def accuracy(llm: LLM, cases: list[Case], answers: list[list[int]]) -> float:
    """Right answers in per cent."""
    right = sum(passes(llm, case, ids) for case, ids in zip(cases, answers, strict=True))
    return 100 * right / len(cases)


@pytest.mark.slow
def test_bundle_answers_every_question_like_pytorch(
    embedded_llm: LLM, eval_cases: list[Case], reference: Any
) -> None:
    assert len(eval_cases) == 738
    prompts = [prompt_ids(embedded_llm, case) for case in eval_cases]
    answers = answers_of(embedded_llm, eval_cases, prompts)

    departed = departures(reference, prompts, answers)
    assert [
        eval_cases[i]["id"]
        for i, (at, logits) in departed.items()
        if not is_tie(embedded_llm, prompts[i] + answers[i][:at], logits)
    ] == []
    assert len(departed) <= 2
    assert round(accuracy(embedded_llm, eval_cases, answers), 1) == DOCUMENTED_ACCURACY


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "points"), [("int8", 0.5), ("int4", 3.0)])
def test_quantised_bundles_as_served_answer_about_as_well(
    eval_cases: list[Case], tmp_path: Path, precision: str, points: float
) -> None:
    options = BuildOptions(precision=precision, verify=False)
    with LLM(build(None, tmp_path / "bundle", options)) as llm:
        prompts = [prompt_ids(llm, case) for case in eval_cases]
        answers = answers_of(llm, eval_cases, prompts)
        assert accuracy(llm, eval_cases, answers) >= DOCUMENTED_ACCURACY - points


@pytest.mark.slow
def test_comparison_finds_a_single_wrong_token(
    embedded_llm: LLM, eval_cases: list[Case], reference: Any
) -> None:
    prompts = [prompt_ids(embedded_llm, case) for case in eval_cases[:3]]
    outputs = embedded_llm.generate(
        prompts, max_new_tokens=40, do_sample=False, repetition_penalty=1.0
    )
    answers = [list(output.token_ids) for output in outputs]
    answers[1][2] += 1

    departed = departures(reference, prompts, answers)

    assert {i: at for i, (at, _) in departed.items()} == {1: 2}
    assert not is_tie(embedded_llm, prompts[1] + answers[1][:2], departed[1][1])
