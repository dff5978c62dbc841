"""LangChain's ChatOpenAI against the server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest
from pydantic import BaseModel, SecretStr

if TYPE_CHECKING:
    from langchain_openai import ChatOpenAI

    from qwen_runtime import LLM

MODEL = "tiny-qwen2-chat"
QUESTION = "What is 17 + 25?"


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Paris"]
    windy: bool


def chat(url: str, **settings: Any) -> ChatOpenAI:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        model=MODEL,
        base_url=f"{url}/v1",
        api_key=SecretStr("none"),
        temperature=0,
        max_retries=0,
        **settings,
    )


def test_invoke_and_stream_equal_generate(base_url: str, embedded_llm: LLM) -> None:
    model = chat(base_url, max_tokens=24)
    expected = embedded_llm.generate(
        [{"role": "user", "content": QUESTION}], do_sample=False, max_new_tokens=24
    )
    answer = model.invoke(QUESTION)
    assert answer.text == expected.text
    assert answer.response_metadata["finish_reason"] == "stop"
    assert "".join(chunk.text for chunk in model.stream(QUESTION)) == expected.text


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output_is_of_its_class(tool_url: str, method: Any) -> None:
    model = chat(tool_url, max_tokens=150).with_structured_output(Weather, method=method)
    assert isinstance(model.invoke(QUESTION), Weather)


def test_bound_tools_are_called(tool_url: str) -> None:
    model = chat(tool_url, max_tokens=150)
    bound = model.bind_tools([Weather], tool_choice="Weather")
    (call,) = bound.invoke(QUESTION).tool_calls
    assert call["name"] == "Weather"
    assert Weather(**call["args"]).city in ("Rome", "Paris")


def test_result_of_a_tool_can_be_sent_back(tool_url: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    model = chat(tool_url, max_tokens=150)
    bound = model.bind_tools([Weather], tool_choice="Weather")
    said: Any = bound.invoke(QUESTION)
    result = ToolMessage("sunny", tool_call_id=said.tool_calls[0]["id"])
    answer = model.bind_tools([Weather]).invoke([HumanMessage(QUESTION), said, result])
    assert answer.response_metadata["finish_reason"] in ("stop", "length", "tool_calls")
