import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime.errors import RequestError
from qwen_runtime.text import (
    ChatParser,
    ChatTemplate,
    ContentDelta,
    ParsedChat,
    ReasoningDelta,
    ToolCall,
    parse_chat,
)


def call(name="f", arguments="{}"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "\n\n", " ", "a", "Hi there. ",
    call(), call("g", '{"x": "é </tool_call> \\" <tool_call>"}'), '{"name": "f"}', '"', "\\", "{",
    "<", "<tool", "</thi", "<think", "é😀", call("f", "[1]"), call("f", '{"a": NaN}'), '"\n',
]  # fmt: skip
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def join(events):
    return ParsedChat(
        content="".join(e.text for e in events if isinstance(e, ContentDelta)),
        reasoning="".join(e.text for e in events if isinstance(e, ReasoningDelta)),
        tool_calls=tuple(e for e in events if isinstance(e, ToolCall)),
    )


@settings(max_examples=400)
@given(ANSWERS, st.lists(st.integers(0, 9), max_size=6), st.booleans(), st.booleans())
def test_any_chunking_gives_the_same_parts(answer, sizes, tools, inside):
    parser = ChatParser(tools=tools, starts_in_reasoning=inside)
    events, rest, turn = [], answer, 0
    while rest:
        size = [*sizes, 1][turn % (len(sizes) + 1)]
        events += parser.push(rest[:size])
        rest, turn = rest[size:], turn + 1
    events += parser.finish()
    assert join(events) == parse_chat(answer, tools=tools, starts_in_reasoning=inside)
    assert all(event.text for event in events if not isinstance(event, ToolCall))
    assert [e.index for e in events if isinstance(e, ToolCall)] == list(
        range(len(join(events).tool_calls))
    )


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_text_without_tags_is_content_unchanged(text):
    assert parse_chat(text) == ParsedChat(text, "", ())


@given(ANSWERS)
def test_nothing_is_parsed_when_nothing_is_looked_for(answer):
    assert parse_chat(answer, reasoning=False, tools=False) == ParsedChat(answer, "", ())


@settings(max_examples=300)
@given(ANSWERS)
def test_only_white_space_and_tags_get_lost(answer):
    parts = parse_chat(answer)
    kept = parts.content + parts.reasoning
    calls = [json.dumps({"name": c.name}) + c.arguments for c in parts.tool_calls]
    letters = sorted(c for c in answer if c in "Hé😀")
    assert letters == sorted(c for c in kept + "".join(calls) if c in "Hé😀")


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [
        (call("f", '{"b": 1, "a": "é<>"}'), "", [("f", '{"b": 1, "a": "é<>"}')]),
        ("Let me look.\n" + call(), "Let me look.", [("f", "{}")]),
        (call("a") + "\n" + call("b"), "", [("a", "{}"), ("b", "{}")]),
        (call("a") + call("b") + "\n", "", [("a", "{}"), ("b", "{}")]),
        ("One.\n" + call() + "\nTwo. ", "One.\n\nTwo. ", [("f", "{}")]),
        (" \n" + call() + "\n Two.", "Two.", [("f", "{}")]),
        ('<tool_call>{"arguments":{"n":[1,null]},"name":"f"}</tool_call>', "",
         [("f", '{"n": [1, null]}')]),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", "{}")]),
        (call("f", '{"t": "</tool_call> <tool_call>"}'), "",
         [("f", '{"t": "</tool_call> <tool_call>"}')]),
        (call("f", '{"t": "\\"</tool_call>"}'), "", [("f", '{"t": "\\"</tool_call>"}')]),
        (call("f", '{"t": "\\ud83d"}'), "", [("f", '{"t": "\\ud83d"}')]),
        (call("f", '{"t": "\\ud83d\\ude00"}'), "", [("f", '{"t": "😀"}')]),
        ("<tool_call>\nnone <tool_call>" + call("g"), "<tool_call>\nnone <tool_call>",
         [("g", "{}")]),
        ('<tool_call>"open ' + call("g"), '<tool_call>"open', [("g", "{}")]),
    ],
)  # fmt: skip
def test_tool_calls_are_taken_out_of_the_content(answer, content, calls):
    parts = parse_chat(answer)
    assert parts.content == content
    assert [(c.name, c.arguments) for c in parts.tool_calls] == calls
    assert [c.index for c in parts.tool_calls] == list(range(len(calls)))


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}",
        "<tool_call>\n{'name': 'f'}\n</tool_call>",
        "<tool_call>\n{\"name\": \"f\", }\n</tool_call>\n",
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        '<tool_call>\n[{"name": "f", "arguments": {}}]\n</tool_call>',
        '<tool_call>\n{"name": "\\ud800", "arguments": {}}\n</tool_call>',
        call("f", '"{}"'), call("f", "null"), call("f", '{"a": NaN}'), call("f", '{"a": 1e999}'),
        call("f", '{"a": ' + "1" * 5000 + "}"), call("f", "[" * 100_000),
        "<tool_call></tool_call>", "</tool_call> <tool_call", "a <tool_call> b </think>\n",
    ],
    ids=lambda answer: answer[:40],
)  # fmt: skip
def test_what_is_no_valid_call_stays_content(answer):
    assert parse_chat(answer) == ParsedChat(answer, "", ())


@pytest.mark.parametrize(
    ("answer", "reasoning", "content"),
    [
        ("<think>\nhm\n\nyes\n</think>\n\nForty-two.\n", "hm\n\nyes", "Forty-two.\n"),
        (" \n<think>hm</think>Yes", "hm", "Yes"),
        ("<think>\n\n</think>\n\nYes", "", "Yes"),
        ("<think>\nunfinished </thi", "unfinished </thi", ""),
        ("<think>\nunfinished\n", "unfinished", ""),
        ("<think>a<think>b</think>c</think>d", "a<think>b", "c</think>d"),
        ("Tags are <think>so</think>.", "", "Tags are <think>so</think>."),
        ("hm\n</think>\n\nYes", "", "hm\n</think>\n\nYes"),
        ("  <thin", "", "  <thin"),
        ("<think>" + call() + "</think>Yes", call(), "Yes"),
    ],
)
def test_reasoning_is_taken_from_the_beginning(answer, reasoning, content):
    assert parse_chat(answer) == ParsedChat(content, reasoning, ())


def test_an_answer_may_start_inside_reasoning():
    parts = parse_chat("\nhm\n</think>\n\n" + call(), starts_in_reasoning=True)
    assert parts == ParsedChat("", "hm", (ToolCall(0, "f", "{}"),))


def test_starting_inside_reasoning_that_is_not_looked_for_is_refused():
    with pytest.raises(RequestError, match="needs reasoning to be looked for") as caught:
        ChatParser(reasoning=False, starts_in_reasoning=True)
    assert caught.value.param == "starts_in_reasoning"


def test_events_come_as_soon_as_they_are_certain():
    parser = ChatParser()
    steps = ["<think>\nI ", "see.\n", "</think>", "\n\nOf", " course", ".\n<tool", "_call>\n",
             '{"name": "f"', ', "arguments": {"x": "', '</tool_call>"}}\n', "</tool_call>"]  # fmt: skip
    assert [parser.push(step) for step in steps] == [
        [ReasoningDelta("I ")],
        [ReasoningDelta("see.")],
        [],
        [ContentDelta("Of")],
        [ContentDelta(" course")],
        [ContentDelta(".")],
        [], [], [], [],
        [ToolCall(0, "f", '{"x": "</tool_call>"}')],
    ]  # fmt: skip
    assert parser.finish() == []


def test_a_malformed_call_is_released_when_it_can_no_longer_become_one():
    parser = ChatParser()
    assert parser.push('<tool_call>\n{"name": "open') == []
    assert join(parser.push("\n")).content == '<tool_call>\n{"name": "open'
    assert join(parser.push("Sorry")).content == "\nSorry"


def test_the_recorded_template_writes_what_the_parser_reads(golden_dir):
    source = (golden_dir / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    arguments = {"b": 1, "a": 'é<>\n"</tool_call>'}
    message = {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }
    user = {"role": "user", "content": "q"}
    prompt = ChatTemplate(source).render([user], add_generation_prompt=True)
    whole = ChatTemplate(source).render([user, message])
    answer = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
    parts = parse_chat(answer)
    assert parts.content == "Let me look."
    assert [(c.name, json.loads(c.arguments)) for c in parts.tool_calls] == [("f", arguments)]


def test_a_long_answer_takes_linear_time():
    def seconds(pieces):
        parser = ChatParser()
        started = time.perf_counter()
        for piece in pieces:
            parser.push(piece)
        parser.finish()
        return time.perf_counter() - started

    assert seconds(["<tool_call>"] * 10_000) < 2
    assert seconds(['<tool_call>{"'] * 10_000) < 2
    assert (
        seconds(['<tool_call>\n{"name": "f", "arguments": {"code": "', *["x = 1; "] * 10_000]) < 2
    )
    assert seconds(["<think>", *["thought "] * 10_000, *["\n"] * 10_000]) < 2
