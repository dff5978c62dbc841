"""What a caller may pass as ``response_format``."""

from types import MappingProxyType

import pytest

from qwen_runtime.errors import RequestError
from qwen_runtime.structured import ResponseFormat, parse_response_format


def schema_format(schema, **more):
    return {"type": "json_schema", "json_schema": {"schema": schema, **more}}


@pytest.mark.parametrize("value", [None, {"type": "text"}])
def test_free_text_is_no_format(value):
    assert parse_response_format(value) is None


def test_json_object_is_the_schema_of_any_object():
    parsed = parse_response_format({"type": "json_object"})
    assert parsed == ResponseFormat("json_schema", '{"type": "object"}')


def test_a_schema_keeps_the_order_of_its_properties():
    parsed = parse_response_format(
        schema_format({"type": "object", "properties": {"z": {}, "a": {}}})
    )
    assert parsed.source == '{"type": "object", "properties": {"z": {}, "a": {}}}'


@pytest.mark.parametrize("strict", [True, False, None])
def test_name_description_and_strict_change_nothing(strict):
    plain = parse_response_format(schema_format({"type": "object"}))
    named = schema_format({"type": "object"}, name="answer", description="An.", strict=strict)
    assert parse_response_format(named) == plain


def test_a_checked_format_and_any_mapping_are_taken():
    parsed = parse_response_format(MappingProxyType({"type": "regex", "pattern": "a+"}))
    assert parsed == ResponseFormat("regex", "a+")
    assert parse_response_format(parsed) is parsed


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("json", "must be a mapping"),
        ({}, "type must be one of text, json_object, json_schema, regex, choice, got None"),
        ({"type": "xml"}, "type must be one of .* got 'xml'"),
        ({"type": ["text"]}, "type must be one of"),
        ({"type": "text", "pattern": "a"}, "of type text takes type, got pattern"),
        ({"type": "regex", "pattern": "a", "flags": "i"}, "takes pattern, type, got flags"),
        ({"type": "regex"}, "of type regex must have pattern"),
        ({"type": "regex", "pattern": ""}, "pattern must be a non-empty text, got ''"),
        ({"type": "regex", "pattern": 5}, "pattern must be a non-empty text, got 5"),
        ({"type": "regex", "pattern": "\ud800"}, "half of a surrogate pair"),
        ({"type": "choice", "choices": []}, "choices must be a list of at least one text"),
        ({"type": "choice", "choices": "yes"}, "choices must be a list"),
        ({"type": "choice", "choices": ["yes", ""]}, "every choice must be a non-empty text"),
        ({"type": "choice", "choices": ["yes", 1]}, "every choice must be a non-empty text"),
        ({"type": "choice", "choices": ["a", "b", "a"]}, "choices must differ, got 'a' twice"),
        ({"type": "json_schema"}, "of type json_schema must have json_schema"),
        ({"type": "json_schema", "json_schema": True}, "json_schema must be a mapping"),
        ({"type": "json_schema", "json_schema": {}}, "under json_schema must have schema"),
        ({"type": "json_schema", "schema": {}}, "takes json_schema, type, got schema"),
        (schema_format({}, version=1), "got version; remove that"),
        (schema_format({}, strict=1), "strict must be true or false, got 1"),
        (schema_format({}, name=3), "name must be a non-empty text, got 3"),
        (schema_format("{}"), "a JSON schema must be a mapping, got '{}'"),
        (schema_format({"const": float("nan")}), "must hold JSON values"),
        (schema_format({"enum": [{1, 2}]}), "must hold JSON values, but {1, 2} is no JSON value"),
    ],
)
def test_a_wrong_format_is_refused_by_name(value, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse_response_format(value)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"minimun": 3}, "keyword 'minimun' at # is unknown or cannot be enforced; remove it"),
        ({"properties": {"a": {"not": {}}}}, "keyword 'not' at #/properties/a is unknown"),
        ({"items": {"uniqueItems": True}}, "keyword 'uniqueItems' at #/items"),
        ({"x-guidance": {"lenient": True}}, "keyword 'x-guidance' at #"),
        ({"anyOf": [{}, {"type": "string", "nullable": True}]}, "nullable at #/anyOf/1"),
        ({"properties": {"a": 5}}, "must be a mapping or true or false, got 5 at #/properties/a"),
    ],
)
def test_a_schema_keyword_that_would_be_ignored_is_refused(schema, message):
    with pytest.raises(RequestError, match=message):
        parse_response_format(schema_format(schema))


def test_names_of_properties_are_no_keywords():
    schema = {"properties": {"not": {"enum": [{"not": 1}]}}, "default": {"minimun": 3}}
    assert parse_response_format(schema_format(schema)) is not None


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("depth", [65, 5000])
def test_a_schema_nested_too_deeply_is_refused(depth):
    with pytest.raises(RequestError, match="nested 64 levels deep"):
        parse_response_format(schema_format(nested(depth)))


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}},
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1},
        {"anyOf": [{"$ref": "#"}, {"allOf": [{"type": "null"}, {"$ref": "#"}]}]},
        {
            "properties": {"a": {"$ref": "#/$defs/x"}},
            "$defs": {
                "x": {
                    "properties": {"y": {"$ref": "#/$defs/y"}},
                    "required": ["y"],
                    "type": "object",
                },
                "y": {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 2},
            },
        },
    ],
)
def test_recursion_without_an_end_is_refused(schema):
    with pytest.raises(RequestError, match="contains itself without an end"):
        parse_response_format(schema_format(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/x~1y"}}, "required": ["a"],
         "$defs": {"x/y": {"type": ["null", "object"], "properties": {"b": {"$ref": "#"}},
                           "required": ["b"]}}},
    ],
)  # fmt: skip
def test_recursion_that_can_end_is_taken(schema):
    assert parse_response_format(schema_format(schema)) is not None
