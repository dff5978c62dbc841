"""Formats compiled: what they accept, and what is refused before generation."""

import sys

import jsonschema
import pytest

from qwen_runtime.errors import RequestError
from qwen_runtime.structured import GrammarCompiler

STRING = {"type": "string"}
INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (STRING, ["", "a", 'quo"te\\', "über 日本 😀", "line\nbreak", 1, None]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ["a", "ab", "日本語", "abcd", "😀😀"]),
        ({"type": "string", "pattern": "^[a-c]+$"}, ["abc", "", "abd"]),
        ({"type": "string", "pattern": "b"}, ["abc", "b", "ac"]),
        ({"type": "string", "pattern": "^a|c$"}, ["axx", "xxc", "xax"]),
        (INTEGER, [0, -5, 12345678901234567890, 1.5, "1", True]),
        ({"type": "number"}, [0, -1.5, 1e30, "1"]),
        ({"type": "integer", "minimum": -3, "maximum": 120}, [-4, -3, 0, 99, 120, 121]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0, 0.001, 0.5, 1, 1.01]),
        ({"type": "integer", "multipleOf": 3}, [0, 9, 10]),
        ({"type": "boolean"}, [True, False, None, 0]),
        ({"type": ["string", "null"], "minLength": 2}, ["a", "ab", None, 1]),
        ({"enum": ["red", 1, None, {"a": [1]}]}, ["red", 1, None, {"a": [1]}, {"a": [2]}, "r"]),
        ({"const": "x y"}, ["x y", "xy"]),
        ({"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2}, [[], [1], [1, 2, 3]]),
        ({"type": "array", "prefixItems": [STRING, INTEGER]}, [["a", 1], ["a"], [1], ["a", 1, 2]]),
        (
            {"type": "object", "properties": {"a": INTEGER, "b": STRING}, "required": ["a"]},
            [{"a": 1}, {"a": 1, "b": "x"}, {"b": "x"}, {"a": "x"}, {"a": 1, "c": [None]}],
        ),
        (
            {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": False},
            [{}, {"a": 1}, {"b": 1}],
        ),
        ({"type": "object", "additionalProperties": INTEGER}, [{}, {"x": 1}, {"x": "y"}]),
        ({"type": "object", "patternProperties": {"^s": STRING}}, [{"s": "a"}, {"s": 1}, {"t": 1}]),
        ({"type": "object", "minProperties": 1, "maxProperties": 2}, [{}, {"a": 1}, {"a": 1, "b": 2, "c": 3}]),
        ({"anyOf": [STRING, INTEGER]}, ["a", 1, None]),
        ({"oneOf": [STRING, INTEGER]}, ["a", 1, None]),
        ({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, [1, 2, 4, 5]),
        ({"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, [[], [[], [[]]], [1]]),
        ({"type": "string", "format": "date"}, ["2024-02-28", "2024-13-01", "x"]),
        ({}, [None, 1, "a", [], {"a": {}}]),
    ],
)  # fmt: skip
def test_a_schema_accepts_exactly_what_jsonschema_validates(
    schema, values, compile_schema, accepts, dumps
):
    grammar = compile_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    verdicts = {dumps(value): validator.is_valid(value) for value in values}
    assert {text: accepts(grammar, text) for text in verdicts} == verdicts


def test_json_object_accepts_objects_and_nothing_else(compiler, accepts):
    grammar = compiler.compile({"type": "json_object"})
    assert accepts(grammar, '{"a": [1, {"b": null}]}')
    assert not accepts(grammar, "[1]")
    assert not accepts(grammar, '{"a": 1} ')


def test_white_space_between_json_tokens_is_bounded(compiler, accepts):
    grammar = compiler.compile({"type": "json_object"})
    assert accepts(grammar, '{"a":1,"b":[]}')
    assert accepts(grammar, '{\n  "a": 1,\n  "b": [\n    2\n  ]\n}')
    assert not accepts(grammar, '{  "a": 1}')
    assert not accepts(grammar, '{\n\n"a": 1}')
    assert not accepts(grammar, "{\n" + 33 * " " + '"a": 1}')


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"[0-9]{3}-[a-z]+", "123-ab", "x123-ab"),
        (r"^(yes|no)$", "yes", "yesno"),
        (r"(?i)ok/\\", "oK/\\", "ok"),
        (r"\p{Han}{2}", "日本", "ab"),
        (r"é|😀", "😀", "e"),
    ],
)
def test_a_pattern_matches_the_whole_answer(pattern, good, bad, compiler, accepts):
    grammar = compiler.compile({"type": "regex", "pattern": pattern})
    assert accepts(grammar, good)
    assert not accepts(grammar, bad)


@pytest.mark.parametrize(
    "choice",
    ['quo"te', "back\\slash", "a\nb\t", "\x00\x1f\x7f\x85\u2028", "😀 日本", "/a+/", "'", "<|im_end|>", " "],
)  # fmt: skip
def test_a_choice_is_taken_literally(choice, compiler):
    grammar = compiler.compile({"type": "choice", "choices": [choice, "other"]})
    matcher = grammar.matcher()
    for byte in choice.encode():
        # The byte alone is a token of every byte-level vocabulary.
        token = next(
            i for i, b in compiler._tokenizer.vocabulary_bytes().items() if b == bytes([byte])
        )
        assert matcher.try_consume_tokens([token]) == 1
    assert matcher.is_accepting()
    matcher = grammar.matcher()
    assert not matcher.try_consume_tokens(compiler._tokenizer.encode("more")[:1]) or choice == "m"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "regex", "pattern": "["}, "cannot be kept to: unclosed character class"),
        ({"type": "regex", "pattern": "(?=a)b"}, "look-around, .* is not supported"),
        ({"type": "regex", "pattern": r"(a)\1"}, "backreferences are not supported"),
        ({"type": "regex", "pattern": r"[a&&b]"}, "nothing matches it"),
    ],
)
def test_a_pattern_that_cannot_be_kept_to_is_refused_in_one_sentence(value, message, compiler):
    with pytest.raises(RequestError, match=message) as caught:
        compiler.compile(value)
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "integer", "minimum": "a"}, "minimum"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable schema"),
        ({"type": "string", "format": "shoe-size"}, "Unknown format: shoe-size"),
        ({"type": "string", "pattern": "a(?!b)"}, "look-around"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"enum": []}, "Unsatisfiable"),
        ({"const": "\ud800"}, "hex escape"),
        ({"$ref": "#/$defs/missing"}, "'/\\$defs/missing' does not exist"),
        ({"$ref": "https://example.com/s.json"}, "example.com"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is unsat"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_in_one_sentence(
    schema, message, compile_schema
):
    with pytest.raises(RequestError, match=message) as caught:
        compile_schema(schema)
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_every_byte_is_refused(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    from qwen_runtime.text import Tokenizer

    backend = Backend(models.BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    compiler = GrammarCompiler(Tokenizer(tmp_path / "tokenizer.json"), 2)
    with pytest.raises(RequestError, match="a token for each of the 256 bytes"):
        compiler.compile({"type": "json_object"})


def test_a_missing_llguidance_is_one_sentence_that_names_the_extra(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiler = GrammarCompiler(tokenizer, 4096)
    with pytest.raises(RequestError, match=r"pip install 'qwen-export\[grammar\]'") as caught:
        compiler.compile({"type": "json_object"})
    assert caught.value.param == "response_format"


def test_free_text_needs_no_llguidance(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert GrammarCompiler(tokenizer, 4096).compile({"type": "text"}) is None


def test_the_last_grammars_are_kept_and_the_oldest_dropped(tokenizer):
    compiler = GrammarCompiler(tokenizer, 4096, cache_size=2)
    formats = [{"type": "regex", "pattern": pattern} for pattern in ("a", "b", "c")]
    first, second = compiler.compile(formats[0]), compiler.compile(formats[1])
    assert compiler.compile(formats[0]) is first
    compiler.compile(formats[2])
    assert compiler.compile(formats[0]) is first
    assert compiler.compile(formats[1]) is not second
