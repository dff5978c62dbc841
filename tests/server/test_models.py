"""The model and its tokens: /v1/models, /tokenize, /detokenize."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from openai import OpenAI

    from qwen_runtime import LLM

MODEL = "tiny-qwen2-chat"


def test_client_lists_and_finds_the_model(client: OpenAI) -> None:
    (listed,) = client.models.list()
    assert listed.id == MODEL
    assert client.models.retrieve(MODEL) == listed


def test_other_models_are_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model must be 'tiny-qwen2-chat'"):
        client.models.retrieve("Qwen/Qwen2-7B")


def test_tokens_are_those_that_the_model_reads(http: httpx.Client, embedded_llm: LLM) -> None:
    messages = [{"role": "user", "content": "你好 17"}]
    for fields, prompt in (
        ({"prompt": "你好 17"}, "你好 17"),
        ({"messages": messages}, messages),
    ):
        document = http.post("/tokenize", json=fields).json()
        expected = embedded_llm.encode(prompt)
        assert document == {"tokens": expected, "count": len(expected), "max_model_len": 2048}


def test_texts_of_tokens_are_sent_where_asked_for(http: httpx.Client) -> None:
    fields = {"prompt": "two words", "return_token_strs": True}
    assert "".join(http.post("/tokenize", json=fields).json()["token_strs"]) == "two words"


def test_empty_text_has_no_tokens(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []


def test_long_text_is_tokenized_like_a_short_one(http: httpx.Client, embedded_llm: LLM) -> None:
    text = "one two three " * 2000
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == embedded_llm.encode(text)


def test_tokens_become_their_text_again(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "Grüße, 世界"}).json()["tokens"]
    document = http.post("/detokenize", json={"tokens": tokens}).json()
    assert document == {"prompt": "Grüße, 世界"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either prompt or messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "either prompt or"),
        ({"prompt": "a", "chat_template_kwargs": {"a": 1}}, "only work with messages"),
        ({"prompt": 5}, "must be text"),
    ],
)
def test_tokenize_says_what_is_wrong(
    http: httpx.Client, fields: dict[str, Any], message: str
) -> None:
    response = http.post("/tokenize", json=fields)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_ids_beyond_the_vocabulary_are_refused(http: httpx.Client) -> None:
    response = http.post("/detokenize", json={"tokens": [5, 99_999]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"
    assert "99999" in response.json()["error"]["message"]
