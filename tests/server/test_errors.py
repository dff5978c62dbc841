"""What a request is refused for: the status, the shape and the field that is named."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

MODEL = "tiny-qwen2-chat"
USER = {"role": "user", "content": "Hi"}
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert document.keys() == {"error"}
    error: dict[str, Any] = document["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"surprise": 1}, "surprise", "is not a known field"),
    ({"suffix": "x"}, "suffix", "put what it needs into the prompt"),
    ({"best_of": 2}, "best_of", "send n"),
    ({"functions": []}, "functions", "send tools"),
    ({"messages": None}, "messages", "got none"),
    ({"messages": []}, "messages", "non-empty list"),
    ({"messages": "Hi"}, "messages", "list"),
    ({"messages": ["Hi"]}, "messages[0]", "an object with role"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role", "one of system"),
    ({"messages": [USER | {"role": "<|im_end|>"}]}, "messages[0].role", "one of system"),
    ({"messages": [USER | {"role": ["user"]}]}, "messages[0].role", "one of system"),
    ({"messages": [USER | {"tone": "kind"}]}, "messages[0].tone", "is not a known field"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "got none"),
    ({"messages": [USER | {"content": 5}]}, "messages[0].content", "a text or a list"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "content or tool_calls"),
    (
        {"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].image_url",
        "is not a known field",
    ),
    ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].tool_call_id", "got none"),
    ({"model": 5}, "model", "must be text"),
    ({"temperature": 2.1}, "temperature", r"in [0, 2]"),
    ({"temperature": True}, "temperature", r"in [0, 2]"),
    ({"temperature": "1"}, "temperature", r"in [0, 2]"),
    ({"top_p": -0.1}, "top_p", r"in [0, 1]"),
    ({"top_k": 1.5}, "top_k", "an integer"),
    ({"min_p": 2}, "min_p", r"in [0, 1]"),
    ({"repetition_penalty": 0}, "repetition_penalty", r"in [0.01, 100]"),
    ({"presence_penalty": 3}, "presence_penalty", r"in [-2, 2]"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "keys that match"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", r"in [-100, 100]"),
    ({"logit_bias": {"05": 1}}, "logit_bias", "keys that match"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "below the vocabulary size"),
    ({"seed": 2**64}, "seed", "an integer"),
    ({"seed": 10**400}, "seed", "an integer"),
    ({"n": 0}, "n", r"in [1, 128]"),
    ({"n": 129}, "n", r"in [1, 128]"),
    ({"stop": ""}, "stop", "non-empty text"),
    ({"stop": ["a", 5]}, "stop[1]", "non-empty text"),
    ({"stop": {}}, "stop", "a list of them"),
    ({"max_tokens": 0}, "max_tokens", "an integer"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "the older name"),
    ({"max_tokens": 100_000}, "max_tokens", "must fit in 2048 tokens"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", r"in [0, 20]"),
    ({"logprobs": 3}, "logprobs", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a known field"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tool_choice": "sometimes"}, "tool_choice", "one of none, auto, required"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "got none"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "one of function"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        "tools[0].function.name",
        "a text that matches",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 2},
        "tools[1].function.name",
        "'f' twice",
    ),
    (
        {"response_format": {"type": "choice", "choices": ["a" * 70_000]}},
        "response_format",
        "at most 65536 characters",
    ),
    (
        {
            "tool_choice": "required",
            "tools": [
                {"type": "function", "function": {"name": "f", "description": "a" * 70_000}}
            ],
        },
        "tools",
        "at most 65536 characters",
    ),
    ({"response_format": {"type": "xml"}}, "response_format.type", "one of text"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "got none"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": {}}}}},
        "response_format",
        "unknown or cannot be enforced",
    ),
    ({"response_format": {"type": "regex", "pattern": "("}}, "response_format", "cannot be kept"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "must not hold tools"),
    ({"chat_template_kwargs": {"tokenize": True}}, "tokenize", "neither"),
    ({"metadata": {"a": 1}}, "metadata.a", "must be text"),
    ({"user": 5}, "user", "must be text"),
]


@pytest.mark.parametrize(("change", "param", "message"), CASES)
def test_wrong_field_is_named(
    http: httpx.Client, change: dict[str, Any], param: str, message: str
) -> None:
    body = {"model": MODEL, "messages": [USER], "max_tokens": 2} | change
    error = error_of(http.post(CHAT, content=json.dumps(body), headers=JSON), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "non-empty text"),
        ({"prompt": []}, "prompt", "a list of"),
        ({"prompt": [True]}, "prompt", "a list of either"),
        ({"prompt": [1, "a"]}, "prompt[1]", "an integer"),
        ({"prompt": [-1]}, "prompt[0]", "an integer"),
        ({"prompt": [[]]}, "prompt[0]", "a non-empty list"),
        ({"prompt": [99999]}, "prompt", "99999"),
        ({"prompt": ["a"] * 129}, "prompt", "1 to 128"),
        ({"prompt": ["a", "b"], "n": 65}, "n", "at most 128"),
        ({"prompt": None}, "prompt", "got none"),
        ({"logprobs": 6}, "logprobs", r"in [0, 5]"),
        ({"echo": True, "logprobs": 1}, "echo", "of the prompt"),
        ({"messages": [USER]}, "messages", "not a known field"),
        (
            {"response_format": {"type": "choice", "choices": ["a" * 70_000]}},
            "response_format",
            "at most 65536 characters",
        ),
    ],
)
def test_wrong_field_of_a_completion_is_named(
    http: httpx.Client, change: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(http.post(COMPLETIONS, json={"model": MODEL, "prompt": "a"} | change), 400)
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e999}', "too large"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a": "\xc3\x28"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udc00": 1}', "surrogate"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested deeper"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "must be JSON"),
        (b"[]", "an object"),
        (b"null", "an object"),
        (b'"text"', "an object"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_body_that_is_no_json_object_is_refused(
    http: httpx.Client, path: str, raw: bytes, message: str
) -> None:
    assert message in error_of(http.post(path, content=raw, headers=JSON), 400)["message"]


def test_other_content_type_is_refused(http: httpx.Client) -> None:
    response = http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"})
    assert error_of(response, 415)["code"] == "unsupported_media_type"


def test_compressed_body_is_refused(http: httpx.Client) -> None:
    headers = JSON | {"content-encoding": "gzip"}
    error = error_of(http.post(CHAT, content=b"{}", headers=headers), 415)
    assert error["code"] == "unsupported_media_type"
    assert "'gzip'" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_other_model_is_not_found(http: httpx.Client, path: str) -> None:
    prompt = {"messages": [USER]} if path == CHAT else {"prompt": "a"}
    error = error_of(http.post(path, json={"model": "gpt-4o"} | prompt), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"


def test_other_address_is_not_found(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/embeddings"), 404)["code"] == "not_found"
    assert error_of(http.post(f"{CHAT}/", json={}), 404)["code"] == "not_found"


def test_other_method_is_refused(http: httpx.Client) -> None:
    response = http.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_too_long_prompt_is_refused_with_the_numbers(
    http: httpx.Client, path: str, stream: bool
) -> None:
    text = "one two three " * 1500
    prompt = {"messages": [USER | {"content": text}]} if path == CHAT else {"prompt": text}
    error = error_of(http.post(path, json={"stream": stream} | prompt), 400)
    assert error["code"] == "context_length_exceeded"
    assert "2048 tokens" in error["message"]


def test_arguments_of_a_call_must_be_an_object(http: httpx.Client) -> None:
    def ask(arguments: str) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        return error_of(http.post(CHAT, json={"messages": [USER, said]}), 400)

    for arguments in ("{", "[1]", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 5000):
        error = ask(arguments)
        assert error["param"] == "messages[1].tool_calls[0].function.arguments"


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"properties": value, "type": "object"}
    return value


@pytest.mark.parametrize("levels", [60, 140])
def test_deep_values_that_are_read_break_nothing(http: httpx.Client, levels: int) -> None:
    deep = nested(levels)
    function = {"name": "f", "parameters": deep}
    called = {"name": "f", "arguments": json.dumps(deep)}
    call = {"id": "1", "type": "function", "function": called}
    for fields, statuses in (
        ({"chat_template_kwargs": deep}, {200}),
        ({"tools": [{"type": "function", "function": function}]}, {200, 400}),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}, {200, 400}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
            {200, 400},
        ),
    ):
        body = {"messages": [USER], "max_tokens": 1} | fields
        response = http.post(CHAT, json=body)
        assert response.status_code in statuses, response.text


def test_large_bodies_are_read_like_small_ones(http: httpx.Client) -> None:
    many = [{"role": "user", "content": "a"}] * 5000
    assert error_of(http.post(CHAT, json={"messages": many}), 400)["param"] == "prompt"
    many[4000] = {"role": "user"}
    error = error_of(http.post(CHAT, json={"messages": many}), 400)
    assert error["param"] == "messages[4000].content"


def test_error_after_the_server_refused_leaves_others_alone(http: httpx.Client) -> None:
    error_of(http.post(CHAT, content=b"{", headers=JSON), 400)
    response = http.post(CHAT, json={"messages": [USER], "max_tokens": 1})
    assert response.status_code == 200
