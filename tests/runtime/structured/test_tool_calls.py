"""Tool calls by schema. The embedded model knows no tools: the grammar makes it call them."""

import json

import jsonschema
import pytest

from qwen_runtime.errors import RequestError
from qwen_runtime.structured import StructuredOutputLogitsProcessor, tool_call_format
from qwen_runtime.text import ChatParser, ToolCall, parse_chat

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "minLength": 1, "maxLength": 12},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "unit"],
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
PING = {"type": "function", "function": {"name": 'ping "all"'}}


def open_lamp(room: str, level: int | None, colour: str = "white") -> bool:
    """Switch a lamp on.

    Args:
        room: Where it is.
        level: Brightness, none for full.
        colour: Its colour. (choices: ["white", "red"])
    """
    return bool(room and level and colour)


def call(name, arguments):
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


W = call("get_weather", {"city": "Bonn", "unit": "C"})
P = call('ping "all"', {})
NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        ("required", True, [W, P, f"{W}\n{P}\n{W}"], ["", "Hi", f"Hi {W}", f"{W}{W}", f"{W}\n"]),
        ("required", False, [W, P], ["", f"{W}\n{P}"]),
        ("auto", True, ["", "Hi <b>", W, f"<think>\nx\n</think>\n\nHi {P}\n{W}"], [f"{W} Hi"]),
        ("auto", False, ["Hi", f"Hi {W}"], [f"{W}\n{W}", "<tool_call>"]),
        (NAMED, True, [W], ["", P, f"{W}\n{W}", "Hi"]),
    ],
)
def test_the_choice_decides_what_an_answer_holds(choice, parallel, good, bad, compiler, accepts):
    grammar = compiler.compile(
        tool_call_format([WEATHER, PING], choice, parallel_tool_calls=parallel)
    )
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"city": "Bonn"},
        {"city": "Bonn", "unit": "K"},
        {"city": "Bonn", "unit": "C", "more": 1},
        {"city": "", "unit": "C"},
    ],
)
def test_arguments_outside_of_the_parameters_are_not_accepted(arguments, compiler, accepts):
    grammar = compiler.compile(tool_call_format([WEATHER], "auto"))
    assert not accepts(grammar, call("get_weather", arguments))


def test_no_tool_is_called_when_none_shall_be():
    assert tool_call_format([WEATHER], "none") is None


def test_a_function_describes_its_arguments(compiler, accepts):
    grammar = compiler.compile(tool_call_format([open_lamp], "required"))
    assert accepts(grammar, call("open_lamp", {"room": "hall", "level": None, "colour": "red"}))
    assert accepts(grammar, call("open_lamp", {"room": "hall", "level": 3}))
    assert not accepts(grammar, call("open_lamp", {"room": "hall"}))
    assert not accepts(grammar, call("open_lamp", {"room": None, "level": 3}))
    assert not accepts(grammar, call("open_lamp", {"room": "hall", "level": 3, "colour": "blue"}))


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_parse_and_their_arguments_validate(choice, embedded_llm, compiler):
    prompt = embedded_llm.tokenizer.encode(
        embedded_llm.chat_template.render(
            [{"role": "user", "content": "What is the weather?"}], add_generation_prompt=True
        )
    )
    grammar = compiler.compile(
        tool_call_format([WEATHER, PING], choice, parallel_tool_calls=False)
    )
    ended = 0
    for seed in range(5):
        output = embedded_llm.generate(
            prompt, max_new_tokens=90, seed=seed, temperature=1.5, top_k=0,
            logits_processor=[StructuredOutputLogitsProcessor(grammar, len(prompt), [4095, 4093])],
        )  # fmt: skip
        parsed = parse_chat(output.text)
        if output.finish_reason != "stop":
            continue
        ended += 1
        assert parsed.content == ""
        (found,) = parsed.tool_calls
        if found.name == "get_weather":
            jsonschema.validate(json.loads(found.arguments), WEATHER["function"]["parameters"])
        else:
            assert found == ToolCall(0, 'ping "all"', "{}")
        parser = ChatParser()
        events = [event for character in output.text for event in parser.push(character)]
        assert [*events, *parser.finish()] == [found]
    assert ended >= 3


def test_with_auto_a_model_without_tools_answers_as_ever(embedded_llm, compiler):
    prompt = embedded_llm.tokenizer.encode(
        embedded_llm.chat_template.render(
            [{"role": "user", "content": "What is 17 + 25?"}], add_generation_prompt=True
        )
    )
    grammar = compiler.compile(tool_call_format([WEATHER], "auto"))
    processor = StructuredOutputLogitsProcessor(grammar, len(prompt), [4095, 4093])
    free = embedded_llm.generate(prompt, max_new_tokens=30, seed=0)
    held = embedded_llm.generate(prompt, max_new_tokens=30, seed=0, logits_processor=[processor])
    assert held.token_ids == free.token_ids


def described(**function):
    return [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("tools", "choice", "param", "message"),
    [
        ([], "auto", "tools", "a list of at least one tool"),
        ([{"name": "x"}], "auto", "tools", "must hold functions"),
        (described(name=""), "auto", "tools", "a name each, a non-empty text, got ''"),
        ([PING, PING], "auto", "tools", "differ in name"),
        (described(name="f", parameters=[]), "auto", "tools", "named arguments, got \\[\\]"),
        (described(name="f", parameters={"type": "string"}), "auto", "tools", "named arguments"),
        (
            described(name="f", parameters={"type": "object", "not": {}}),
            "auto",
            "tools",
            "tools: the schema keyword 'not' at #",
        ),
        ([WEATHER], "always", "tool_choice", 'must be "auto", "required"'),
        ([WEATHER], {"type": "function"}, "tool_choice", 'must be "auto", "required"'),
        (
            [WEATHER],
            {"type": "function", "function": {"name": "fly"}},
            "tool_choice",
            "must name one of get_weather, got 'fly'",
        ),
    ],
)
def test_wrong_tools_and_choices_are_refused_by_name(tools, choice, param, message):
    with pytest.raises(RequestError, match=message) as caught:
        tool_call_format(tools, choice)
    assert caught.value.param == param


def test_whether_calls_may_be_parallel_is_true_or_false():
    with pytest.raises(RequestError, match="parallel_tool_calls must be true or false, got 1"):
        tool_call_format([WEATHER], parallel_tool_calls=1)


def test_parameters_that_cannot_be_kept_to_are_refused_when_compiled(compiler):
    tools = described(
        name="f", parameters={"type": "object", "properties": {"a": {"format": "shoe-size"}}}
    )
    with pytest.raises(RequestError, match="shoe-size") as caught:
        compiler.compile(tool_call_format(tools), param="tools")
    assert caught.value.param == "tools"
    assert "\n" not in str(caught.value)
