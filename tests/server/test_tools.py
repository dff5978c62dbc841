"""Tool calls and reasoning: parsed, streamed, and kept to a schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

if TYPE_CHECKING:
    from qwen_runtime import LLM

MODEL = "tiny-qwen2-chat"
MESSAGES: list[Any] = [{"role": "user", "content": "Weather in Rome?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Paris"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'

Say = Callable[[str], str]


def ask(url: str, *, stream: bool = False, **fields: Any) -> Any:
    """The message, finish reason and number of deltas of an answer, streamed or not."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": MESSAGES,
            "temperature": 0,
            "max_tokens": 120,
        }
        if not stream:
            choice = client.chat.completions.create(**asked | fields).choices[0]
            return choice.message, choice.finish_reason
        with client.chat.completions.stream(**asked | fields) as events:
            choice = events.get_final_completion().choices[0]
        return choice.message, choice.finish_reason


def called(message: Any) -> list[tuple[str, Any]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in message.tool_calls or ()
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_are_parsed_from_free_text(say: Say, stream: bool) -> None:
    url = say(f'Let me look.\n{CALL}\n<tool_call>\n{{"name": "clock"}}\n</tool_call>')
    message, reason = ask(url, stream=stream, tools=TOOLS)
    assert called(message) == [("weather", {"city": "Rome", "days": 2}), ("clock", {})]
    assert message.content == "Let me look."
    assert reason == "tool_calls"
    assert len({call.id for call in message.tool_calls}) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_call_without_text_has_no_content(say: Say, stream: bool) -> None:
    message, reason = ask(say(CALL), stream=stream, tools=TOOLS)
    assert message.content is None
    assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_calls_stay_text_where_there_are_no_tools(
    say: Say, stream: bool, fields: dict[str, Any]
) -> None:
    message, reason = ask(say(CALL), stream=stream, **fields)
    assert message.content == CALL
    assert not message.tool_calls
    assert reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_told_apart(say: Say, stream: bool) -> None:
    url = say("<think>\nRome, hm.\n</think>\n\nSunny.")
    if stream:
        with httpx.stream(
            "POST",
            f"{url}/v1/chat/completions",
            json={"messages": MESSAGES, "stream": True, "temperature": 0},
        ) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
        assert lines[-1] == "[DONE]"
        assert deltas[0]["role"] == "assistant"
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Rome, hm."
        assert "".join(delta.get("content", "") for delta in deltas) == "Sunny."
    else:
        message, _ = ask(url)
        assert message.reasoning_content == "Rome, hm."
        assert message.content == "Sunny."


def test_prompt_that_opens_reasoning_starts_the_answer_in_it(say: Say) -> None:
    # What templates of models that always think end with.
    opened = [*MESSAGES, {"role": "assistant", "content": "<think>"}]
    message, _ = ask(
        say("Hm.\n</think>\n\nSunny."),
        messages=opened,
        extra_body={"chat_template_kwargs": {"continue_final_message": True}},
    )
    assert message.reasoning_content == "Hm."
    assert message.content == "Sunny."


def test_template_variables_reach_the_template(tool_url: str, tool_llm: LLM) -> None:
    fields = {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}
    tokens = httpx.post(f"{tool_url}/tokenize", json=fields).json()["tokens"]
    assert tokens == tool_llm.encode(MESSAGES, chat_template_kwargs={"enable_thinking": False})
    assert tokens != tool_llm.encode(MESSAGES)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_forced_call_keeps_to_the_schema(tool_url: str, stream: bool, choice: Any) -> None:
    message, reason = ask(
        tool_url, stream=stream, tools=TOOLS[:1], tool_choice=choice, parallel_tool_calls=False
    )
    ((name, arguments),) = called(message)
    assert name == "weather"
    assert arguments["city"] in ("Rome", "Paris")
    assert 1 <= arguments["days"] <= 9
    assert reason == "tool_calls"
    assert message.content is None


def test_named_tool_is_the_one_that_is_called(tool_url: str) -> None:
    for name in ("weather", "clock"):
        choice = {"type": "function", "function": {"name": name}}
        message, _ = ask(tool_url, tools=TOOLS, tool_choice=choice)
        assert [function for function, _ in called(message)] == [name]


def test_tool_that_is_not_there_cannot_be_chosen(tool_url: str) -> None:
    response = httpx.post(
        f"{tool_url}/v1/chat/completions",
        json={
            "messages": MESSAGES,
            "tools": TOOLS,
            "tool_choice": {"type": "function", "function": {"name": "radio"}},
        },
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tool_choice"


def test_calls_and_a_response_format_exclude_each_other(tool_url: str) -> None:
    response = httpx.post(
        f"{tool_url}/v1/chat/completions",
        json={
            "messages": MESSAGES,
            "tools": TOOLS,
            "response_format": {"type": "json_object"},
        },
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format"


def history() -> list[Any]:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'},
    }
    return [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]


def test_calls_and_results_reach_a_template_that_knows_them(tool_url: str, tool_llm: LLM) -> None:
    fields = {"messages": history(), "tools": TOOLS}
    tokens = httpx.post(f"{tool_url}/tokenize", json=fields).json()["tokens"]
    said = history()
    said[1] |= {"content": ""}
    said[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Rome", "days": 2}
    assert tokens == tool_llm.encode(said, tools=TOOLS)


def test_tools_are_spelled_out_for_a_template_that_does_not_know_them(
    base_url: str, embedded_llm: LLM
) -> None:
    fields = {"messages": [{"role": "system", "content": "Be short."}, *history()], "tools": TOOLS}
    document = httpx.post(f"{base_url}/tokenize", json=fields).json()
    assert embedded_llm.tokenizer is not None
    prompt = embedded_llm.tokenizer.decode(document["tokens"])
    assert "Be short.\n\n# Tools" in prompt
    assert json.dumps(TOOLS[0]) in prompt
    assert f"assistant\n{CALL}<|im_end|>" in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt


def test_strict_tool_cannot_be_called_against_its_schema(say: Say) -> None:
    url = say(CALL.replace("Rome", "London"))
    message, _ = ask(url, tools=TOOLS)
    assert called(message) == [("weather", {"city": "London", "days": 2})]
    strict = [{**TOOLS[0], "function": TOOLS[0]["function"] | {"strict": True}}]
    # The grammar allows no city that the model of this test would say.
    with pytest.raises(BadRequestError, match="removed every token"):
        ask(url, tools=strict)
