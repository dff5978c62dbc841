"""Chat completions through OpenAI's own client, compared with `LLM.generate`."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from openai import OpenAI

    from qwen_runtime import LLM

MODEL = "tiny-qwen2-chat"
MESSAGES: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}


def test_greedy_answer_equals_generate(client: OpenAI, embedded_llm: LLM) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=24
    )
    expected = embedded_llm.generate(MESSAGES, **GREEDY)
    choice = answer.choices[0]
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(expected.token_ids)
    assert answer.model == MODEL
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")


def test_streamed_answer_equals_generate(client: OpenAI, embedded_llm: LLM) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0,
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    expected = embedded_llm.generate(MESSAGES, **GREEDY)
    *answers, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answers) == expected.text
    assert answers[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in answers[1:])
    assert [chunk.choices[0].finish_reason for chunk in answers[:-1]] == [None] * (
        len(answers) - 1
    )
    assert answers[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in answers)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(expected.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_without_options_has_no_usage(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_completion_tokens=3, stream=True
        )
    )
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_seeded_choices_equal_generate_with_their_seeds(client: OpenAI, embedded_llm: LLM) -> None:
    settings: dict[str, Any] = {"temperature": 2.0, "top_p": 1.0, "seed": 7}
    vague: list[Any] = [{"role": "user", "content": "Tell xq of zebras, blue"}]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=vague,
        n=3,
        max_completion_tokens=16,
        **settings,
        extra_body={"top_k": 0},
    )
    for index, choice in enumerate(answer.choices):
        expected = embedded_llm.generate(
            vague, do_sample=True, max_new_tokens=16, top_k=0, **settings | {"seed": 7 + index}
        )
        assert choice.index == index
        assert choice.message.content == expected.text
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(embedded_llm.encode(vague))


def test_streamed_choices_equal_those_that_are_not(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "n": 3,
        "seed": 3,
        "temperature": 1.2,
        "max_completion_tokens": 16,
    }
    whole = client.chat.completions.create(**asked)
    texts, reasons = [""] * 3, [""] * 3
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_second_request_finds_its_prompt_in_the_cache(client: OpenAI, embedded_llm: LLM) -> None:
    long: list[Any] = [{"role": "user", "content": "Count: " + " ".join(map(str, range(100)))}]
    asked: dict[str, Any] = {"model": MODEL, "messages": long, "max_completion_tokens": 2}
    client.chat.completions.create(**asked)
    usage = client.chat.completions.create(**asked).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    expected = embedded_llm.generate(long, do_sample=False, max_new_tokens=2)
    assert usage.prompt_tokens_details.cached_tokens == expected.num_cached_tokens > 300


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_equal_generate(client: OpenAI, embedded_llm: LLM, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "temperature": 0,
        "max_completion_tokens": 24,
        "logprobs": True,
        "top_logprobs": 3,
        "stream": stream,
    }
    answer: Any = client.chat.completions.create(**asked)
    chunks = list(answer) if stream else [answer]
    entries = [
        entry
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content
    ]
    expected = embedded_llm.generate(MESSAGES, **GREEDY, logprobs=True, top_logprobs=3)
    tokenizer = embedded_llm.tokenizer
    assert tokenizer is not None
    *tokens, end = expected.logprobs or []
    assert end.token_id in (4093, 4095)  # ends the answer, and is no text
    assert [entry.logprob for entry in entries] == [token.logprob for token in tokens]
    raw = b"".join(bytes(entry.bytes) for entry in entries)
    assert raw.decode() == "".join(entry.token for entry in entries) == expected.text
    for entry, token in zip(entries, tokens, strict=True):
        assert [(bytes(top.bytes), top.logprob) for top in entry.top_logprobs] == [
            (tokenizer.token_bytes(token_id), logprob) for token_id, logprob in token.top
        ]


def test_stop_text_ends_the_answer_before_it(client: OpenAI, embedded_llm: LLM) -> None:
    full = embedded_llm.generate(MESSAGES, **GREEDY).text
    stop = full[5:8]
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=24, stop=[stop, "§§"]
    )
    assert answer.choices[0].message.content == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_limit_is_told_by_the_finish_reason(client: OpenAI, embedded_llm: LLM) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=3
    )
    assert answer.choices[0].finish_reason == "length"
    expected = embedded_llm.generate(MESSAGES, do_sample=False, max_new_tokens=3)
    assert answer.choices[0].message.content == expected.text


def test_logit_bias_and_penalties_reach_the_model(client: OpenAI, embedded_llm: LLM) -> None:
    first = embedded_llm.generate(MESSAGES, **GREEDY).token_ids[0]
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        logit_bias={str(first): -100},
        presence_penalty=1.5,
        frequency_penalty=0.5,
        extra_body={"repetition_penalty": 1.3},
    )
    expected = embedded_llm.generate(
        MESSAGES,
        do_sample=False,
        max_new_tokens=12,
        logit_bias={first: -100.0},
        presence_penalty=1.5,
        frequency_penalty=0.5,
        repetition_penalty=1.3,
    )
    assert answer.choices[0].message.content == expected.text
    assert expected.token_ids[0] != first


def test_vendor_fields_reach_the_model(client: OpenAI, embedded_llm: LLM) -> None:
    settings: dict[str, Any] = {"top_k": 5, "min_p": 0.05}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=1.5,
        max_tokens=12,
        seed=11,
        extra_body=settings,
    )
    expected = embedded_llm.generate(
        MESSAGES, do_sample=True, temperature=1.5, max_new_tokens=12, seed=11, **settings
    )
    assert answer.choices[0].message.content == expected.text


def test_left_out_settings_are_the_bundles(client: OpenAI, embedded_llm: LLM) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=5, max_tokens=12)
    expected = embedded_llm.generate(MESSAGES, seed=5, max_new_tokens=12)
    assert answer.choices[0].message.content == expected.text


def test_fields_without_effect_are_accepted(client: OpenAI, embedded_llm: LLM) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=6,
        top_p=0.3,
        user="u",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
    )
    expected = embedded_llm.generate(MESSAGES, do_sample=False, max_new_tokens=6)
    assert answer.choices[0].message.content == expected.text


def test_text_parts_and_developer_messages_become_plain_messages(
    client: OpenAI, embedded_llm: LLM
) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "What is"}]},
            {"role": "assistant", "content": "Yes?"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "+ 5?"}],
            },
        ],
        temperature=0,
        max_tokens=12,
    )
    expected = embedded_llm.generate(
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "What is"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "4\n+ 5?"},
        ],
        do_sample=False,
        max_new_tokens=12,
    )
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_answer_of_a_client_can_be_sent_back(client: OpenAI) -> None:
    first = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12
    )
    again: Any = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "Sure?"}]
    answer = client.chat.completions.create(
        model=MODEL, messages=again, temperature=0, max_tokens=4
    )
    assert answer.choices[0].message.content


def test_json_schema_is_kept_to(client: OpenAI) -> None:
    from pydantic import BaseModel

    class Sum(BaseModel):
        left: int
        right: int
        total: int

    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=60, response_format=Sum
    )
    assert isinstance(answer.choices[0].message.parsed, Sum)


def test_json_object_is_kept_to_while_it_streams(client: OpenAI, embedded_llm: LLM) -> None:
    chunks = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        max_tokens=60,
        stream=True,
        response_format={"type": "json_object"},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    expected = embedded_llm.generate(
        MESSAGES, do_sample=False, max_new_tokens=60, response_format={"type": "json_object"}
    )
    assert text == expected.text
    if expected.finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_async_client_gets_the_same_answers(base_url: str, embedded_llm: LLM) -> None:
    from openai import AsyncOpenAI

    async def ask(client: AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"{number} + 4"}],
            temperature=0,
            max_tokens=16,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(6)))

    expected = [
        embedded_llm.generate(
            [{"role": "user", "content": f"{number} + 4"}], do_sample=False, max_new_tokens=16
        ).text
        for number in range(6)
    ]
    assert asyncio.run(run()) == expected
