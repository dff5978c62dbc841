import dataclasses
import enum
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from qwen_runtime.errors import RequestError
from qwen_runtime.text import ChatTemplate

USER = {"role": "user", "content": " hi  you "}


@pytest.fixture(scope="module")
def template(golden_dir, special_tokens):
    source = (golden_dir / "tokenizer" / "chat_template.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, special_tokens)


def _reason(recorded):
    """The message of a recorded "TypeName: message", up to what only transformers' says."""
    return recorded.split(": ", 1)[1].split(". Use")[0].split(" Provide")[0]


def test_recorded_chats_render_to_the_same_text_and_ids(template, tokenizer, golden):
    assert len(golden["chat"]) == 30
    for case in golden["chat"]:
        if case["error"] is None:
            text = template.render(case["messages"], **case["kwargs"])
            assert text == case["text"]
            assert tokenizer.encode(text) == case["ids"]


MEANINGS = {
    "continue_final_message and add_generation_prompt are not compatible": (
        "continue_final_message and add_generation_prompt are not compatible"
    ),
    "Unexpected role: robot": "the chat template refuses the messages: Unexpected role: robot",
    "Cannot apply chat template to an empty conversation.": "at least one message.*empty",
}


def test_recorded_chat_errors_have_an_equivalent(template, golden):
    errors = [case for case in golden["chat"] if case["error"] is not None]
    assert {_reason(case["error"]) for case in errors} == set(MEANINGS)
    for case in errors:
        with pytest.raises(RequestError, match=MEANINGS[_reason(case["error"])]):
            template.render(case["messages"], **case["kwargs"])


def test_recorded_jinja_features_render_the_same_or_fail_for_the_same_reason(
    golden, special_tokens
):
    assert len(golden["jinja"]) == 19
    for case in golden["jinja"]:
        template = ChatTemplate(case["template"], special_tokens)
        if case["error"] is None:
            assert template.render([USER], **case["context"]) == case["text"]
        else:
            message = _escape(case["error"].split(": ", 1)[1])
            with pytest.raises(RequestError, match=message) as caught:
                template.render([USER], **case["context"])
            assert caught.value.param == "messages"


def _escape(text):
    return "".join(f"\\{c}" if c in ".()[]" else c for c in text)


ECHO = "{% for m in messages %}{{ m | tojson }}{% endfor %}|{{ tools | tojson }}|{{ documents }}"
TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for b in m.content %}{{ b.text or b.type }}{% endfor %}{% endif %}.{% endfor %}"
)
REASONING = (
    "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}/{{ m.content }}{% endfor %}"
)
SCOPES = (
    "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}"
    "{% generation %}{% set x = 5 %}{{ m.content[:3] }}{% endgeneration %}{{ x is defined }}"
    "{% if loop.index == 2 %}{% continue %}{% endif %}{% endfor %}{{ ns.n }}{{ ns.self }}"
    "{{ dict(a=1) }}{{ dict.fromkeys([1], 2) }}{{ eos_token }}{{ mood | default('calm') }}"
)


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Name(str):
    __slots__ = ()


@dataclasses.dataclass
class Point:
    x: int
    tag: str


CONVERSATIONS = {
    "plain": [{"role": "system", "content": "be é"}, {"role": "user", "content": " a\n"}],
    "none_values": [
        {"role": "user", "content": "q", "name": None},
        {"role": "assistant", "content": None, "tool_calls": None, "deep": {"kept": None}},
    ],
    "reasoning": [{"role": "assistant", "reasoning": "r", "content": "c"}],
    "thinking": [{"content": "c", "thinking": "t", "reasoning": "r", "role": "assistant"}],
    "blocks": [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image"}]}],
    "rich": [
        {
            "role": "user",
            "content": "x",
            "extra": (
                np.float32(0.5), np.float64(0.25), np.int64(3), np.bool_(False), np.zeros(2),
                Colour.RED, Level.HIGH, Name("n"), Point(1, "p"), {1}, b"b", 10**20, True,
            ),
        }
    ],
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "description": "<&>", "parameters": {}}}
KEYWORDS = [
    {},
    {"add_generation_prompt": True},
    {"continue_final_message": True},
    {"continue_final_message": "reasoning"},
    {"tools": [TOOL], "documents": [{"title": "t", "text": "é"}]},
    {"tools": [], "mood": "glad", "eos_token": "other"},
]


@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda keywords: "+".join(keywords) or "none")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_rendering_equals_transformers(
    reference_tokenizer, special_tokens, conversation, keywords
):
    messages = CONVERSATIONS[conversation]
    for source in (ECHO, TURNS, BLOCKS, REASONING, SCOPES):
        try:
            expected = reference_tokenizer.apply_chat_template(
                messages, chat_template=source, tokenize=False, **keywords
            )
        except Exception:  # noqa: BLE001  whatever it raises, ours must be a RequestError
            with pytest.raises(RequestError, match=r"chat template|continue_final_message"):
                ChatTemplate(source, special_tokens).render(messages, **keywords)
        else:
            assert ChatTemplate(source, special_tokens).render(messages, **keywords) == expected


def test_the_parity_cases_are_mostly_successes(reference_tokenizer):
    rendered = 0
    for messages in CONVERSATIONS.values():
        for source in (ECHO, TURNS, BLOCKS, REASONING, SCOPES):
            try:
                reference_tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False
                )
            except Exception:  # noqa: BLE001  counted, not looked at
                continue
            rendered += 1
    assert rendered >= 20


def test_the_embedded_models_template_equals_transformers(reference_tokenizer, golden_dir):
    import json

    folder = golden_dir.parents[2] / "exporter" / "qwen_export" / "data" / "tiny-qwen2-chat"
    source = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    expected = reference_tokenizer.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert ChatTemplate(source).render(messages, add_generation_prompt=True) == expected
    assert expected.endswith("What is 17 + 25?<|im_end|>\n<|im_start|>assistant\n")


def test_messages_are_not_modified(template):
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    ChatTemplate(BLOCKS).render(messages, continue_final_message=True)
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]


def test_dataclasses_and_models_serve_as_messages():
    @dataclasses.dataclass
    class Message:
        role: str
        content: str | None = None

    class Model:
        def model_dump(self):
            return {"role": "user", "content": "from a model"}

    assert ChatTemplate(TURNS).render([Message("user", "a"), Model()]) == (
        "<user>a</><user>from a model</>"
    )
    assert ChatTemplate("{{ messages[0] }}").render([Message("user")]) == "{'role': 'user'}"


def test_functions_become_tool_schemas():
    def add(a: int) -> int:
        """Add one.

        Args:
            a: A number.
        """
        return a + 1

    text = ChatTemplate("{{ tools[0].function.name }} {{ tools[0].function.parameters }}").render(
        [USER], tools=[add]
    )
    assert text == (
        "add {'type': 'object', 'properties': {'a': {'type': 'integer', "
        "'description': 'A number.'}}, 'required': ['a']}"
    )


def test_named_templates_are_chosen_as_in_transformers():
    both = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"})
    assert both.render([USER]) == "plain"
    assert both.render([USER], tools=[]) == "tools"
    assert ChatTemplate({"default": "plain"}).render([USER], tools=[TOOL]) == "plain"


def test_named_templates_without_default_are_refused():
    with pytest.raises(RequestError, match=r"one named 'default', got \['rag', 'tool_use'\]"):
        ChatTemplate({"tool_use": "t", "rag": "r"}).render([USER])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "valid Jinja, but line 2 has an error: Expected an expression"),
        ("{{ 1 | nope }}", "valid Jinja, but line 1 has an error: No filter named 'nope'"),
        ("{{ raise_exception('no pets') }}", "refuses the messages: no pets"),
        ("{{ messages.clear() }}", "sandbox forbids: access to attribute 'clear'"),
        ("{{ cycler.__init__.__globals__ }}", "sandbox forbids"),
        ("{% set n = namespace(__class__=1) %}", "sandbox forbids: .*start with '_'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "sandbox forbids: .*got '_x'"),
        ("{{ 'a' + 1 }}", r"failed on the messages \(TypeError\)"),
        ("{{ 1 / 0 }}", r"failed on the messages \(ZeroDivisionError\): division by zero"),
        ("{{ range(10**9) | list }}", r"failed on the messages \(OverflowError\)"),
        ("{{ nobody.name }}", r"failed on the messages \(UndefinedError\): 'nobody' is undefined"),
        ("{{ nobody | tojson }}", r"failed on the messages \(TypeError\).*Undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"\(RecursionError\)"),
        ("{% include 'x' %}", r"failed on the messages \(TypeError\)"),
    ],
)
def test_a_template_that_fails_is_one_clear_error(source, message):
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(source).render([USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("messages", "keywords", "message", "param"),
    [
        ("hi", {}, "messages must be a list of dicts, got str", "messages"),
        (USER, {}, "messages must be a list of dicts, got dict", "messages"),
        ([], {}, "at least one message", "messages"),
        (["hi"], {}, "message 0 is str", "messages"),
        ([USER, [USER]], {}, "message 1 is list", "messages"),
        ([USER], {"tools": TOOL}, "tools must be a list .* got dict", "tools"),
        ([USER], {"tools": ["f"]}, "tools must hold JSON schemas .* got str", "tools"),
        ([USER], {"documents": ["d"]}, r"documents must be a list of dicts.*\['d'\]", "documents"),
        ([USER], {"documents": {"d": 1}}, "documents must be a list of dicts", "documents"),
        ([USER], {"tokenize": True}, "tokenize is neither", "tokenize"),
        ([USER], {"sanitize_control_tokens": True}, "is neither", "sanitize_control_tokens"),
        (
            [{"role": "user"}],
            {"continue_final_message": True},
            "the last message has no 'content'",
            "continue_final_message",
        ),
        (
            [{"role": "user", "content": "a", "mood": "glad"}],
            {"continue_final_message": "mood"},
            "does not read 'mood'",
            "continue_final_message",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            {"continue_final_message": True},
            "no text in the 'content'",
            "continue_final_message",
        ),
    ],
)
def test_wrong_arguments_are_named(messages, keywords, message, param):
    with pytest.raises(RequestError, match=message) as caught:
        ChatTemplate(TURNS).render(messages, **keywords)
    assert caught.value.param == param


def test_continuing_a_message_the_template_shortens_is_refused():
    source = "{% for m in messages %}{{ m.content[:2] }}{% endfor %}"
    with pytest.raises(RequestError, match="does not show the whole of the last message"):
        ChatTemplate(source).render([USER], continue_final_message=True)


def test_many_threads_may_render_at_once(template):
    def render(number):
        return template.render([{"role": "user", "content": str(number)}])

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(render, range(200)))
    assert texts == [render(number) for number in range(200)]


def test_variables_reach_the_template_as_plain_data_only():
    class Thing:
        def secret(self):
            return "out"

    template = ChatTemplate("{{ thing }} {{ thing.secret is defined }} {{ number.shape }}")
    assert template.render([USER], thing=Thing(), number=np.float32(1)) == "<Thing> False "
