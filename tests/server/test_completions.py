"""Plain completions through OpenAI's own client, compared with `LLM.generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from openai import OpenAI

    from qwen_runtime import LLM

MODEL = "tiny-qwen2-chat"
PROMPT = "The sum of two and two is"


def test_greedy_completion_equals_generate(client: OpenAI, embedded_llm: LLM) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0)
    expected = embedded_llm.generate(PROMPT, do_sample=False, max_new_tokens=16)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_token_ids_give_the_same_as_their_text(client: OpenAI, embedded_llm: LLM) -> None:
    ids = embedded_llm.encode(PROMPT)
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    by_text = client.completions.create(**asked, prompt=PROMPT)
    by_ids = client.completions.create(**asked, prompt=ids)
    by_both = client.completions.create(**asked, prompt=[ids, ids])
    assert by_ids.choices[0].text == by_text.choices[0].text
    assert [choice.text for choice in by_both.choices] == [by_text.choices[0].text] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_has_its_own_choices(client: OpenAI, embedded_llm: LLM, stream: bool) -> None:
    prompts = ["One plus one", "A dog is"]
    answer: Any = client.completions.create(
        model=MODEL,
        prompt=prompts,
        n=2,
        seed=4,
        temperature=1.1,
        max_tokens=8,
        echo=True,
        stream=stream,
    )
    texts = [""] * 4
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    expected = [
        prompt
        + embedded_llm.generate(
            prompt, do_sample=True, temperature=1.1, max_new_tokens=8, seed=4 + index
        ).text
        for prompt in prompts
        for index in range(2)
    ]
    assert texts == expected


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_older_shape(client: OpenAI, embedded_llm: LLM, stream: bool) -> None:
    prompt = "数字 17 + 25 = "
    answer: Any = client.completions.create(
        model=MODEL, prompt=prompt, temperature=0, max_tokens=12, logprobs=2, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    parts = [
        choice.logprobs
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
    ]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    tops = [top for part in parts for top in part.top_logprobs]
    expected = embedded_llm.generate(
        prompt, do_sample=False, max_new_tokens=12, logprobs=True, top_logprobs=2
    )
    kept = [item for item in expected.logprobs or [] if item.token_id not in (4093, 4095)]
    assert [value for part in parts for value in part.token_logprobs] == [
        item.logprob for item in kept
    ]
    assert "".join(tokens) == expected.text
    assert offsets == [len("".join(tokens[:index])) for index in range(len(tokens))]
    for token, top, item in zip(tokens, tops, kept, strict=True):
        assert top[token] == item.logprob
        assert set(top.values()) == {logprob for _, logprob in item.top} | {item.logprob}


def test_last_chunk_has_the_usage_of_all_prompts(client: OpenAI, embedded_llm: LLM) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt=["a", "b c"],
            max_tokens=2,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    usage = chunks[-1].usage
    assert chunks[-1].choices == []
    assert usage is not None
    assert usage.prompt_tokens == len(embedded_llm.encode("a")) + len(embedded_llm.encode("b c"))


def test_completion_keeps_to_a_choice(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        max_tokens=12,
        extra_body={"response_format": {"type": "choice", "choices": ["four", "five"]}},
    )
    assert answer.choices[0].text in ("four", "five")
