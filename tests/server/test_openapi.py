"""/openapi.json: valid, true to what is accepted, and answered as it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from qwen_runtime.server.chat_request import CHAT_REQUEST
from qwen_runtime.server.completion_request import COMPLETION_REQUEST
from qwen_runtime.server.models import DETOKENIZE_REQUEST, TOKENIZE_REQUEST

if TYPE_CHECKING:
    from qwen_runtime.server.fields import Table

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
USER = {"role": "user", "content": "Hi"}


def test_document_describes_every_route(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/tokenize",
        "/detokenize",
    }
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("table", "body"),
    [
        (CHAT_REQUEST, {"messages": [USER]}),
        (CHAT_REQUEST, {"messages": [USER], "temperature": None, "seed": 3.0, "stop": ["a"]}),
        (CHAT_REQUEST, {"messages": [USER | {"content": [{"type": "text", "text": "a"}]}]}),
        (CHAT_REQUEST, {"messages": [USER], "response_format": {"type": "json_object"}}),
        (CHAT_REQUEST, {"messages": [USER], "tool_choice": "none", "logit_bias": {"7": 1}}),
        (CHAT_REQUEST, {"messages": [{"role": "assistant", "content": "a", "refusal": None}]}),
        (COMPLETION_REQUEST, {"prompt": "a", "logprobs": 0}),
        (COMPLETION_REQUEST, {"prompt": [[1, 2], [3]]}),
        (COMPLETION_REQUEST, {"prompt": [1.0, 2]}),
        (CHAT_REQUEST, {"messages": [USER], "stream_options": None, "top_logprobs": None}),
        (TOKENIZE_REQUEST, {"prompt": ""}),
        (DETOKENIZE_REQUEST, {"tokens": []}),
    ],
)
def test_schema_takes_what_is_read(table: Table, body: dict[str, Any]) -> None:
    jsonschema.validate(body, table.schema())
    assert table.read(body).keys() == {field.name for field in table.fields}


@pytest.mark.parametrize(
    ("table", "body"),
    [
        (CHAT_REQUEST, {}),
        (CHAT_REQUEST, {"messages": []}),
        (CHAT_REQUEST, {"messages": [USER], "surprise": 1}),
        (CHAT_REQUEST, {"messages": [USER], "temperature": 3}),
        (CHAT_REQUEST, {"messages": [USER], "temperature": True}),
        (CHAT_REQUEST, {"messages": [USER], "n": 1.5}),
        (CHAT_REQUEST, {"messages": [USER], "stop": [""]}),
        (CHAT_REQUEST, {"messages": [USER | {"role": "narrator"}]}),
        (CHAT_REQUEST, {"messages": [USER], "logit_bias": {"a": 1}}),
        (CHAT_REQUEST, {"messages": [USER], "tools": [{"type": "function"}]}),
        (CHAT_REQUEST, {"messages": [{"role": "assistant", "content": "a", "refusal": "b"}]}),
        (COMPLETION_REQUEST, {"prompt": []}),
        (COMPLETION_REQUEST, {"prompt": "a", "n": True}),
        (COMPLETION_REQUEST, {"prompt": [True]}),
        (DETOKENIZE_REQUEST, {"tokens": [-1]}),
    ],
)
def test_schema_refuses_what_is_refused(table: Table, body: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError, match=r"."):
        jsonschema.validate(body, table.schema())
    with pytest.raises(ValueError, match=r"must be|is not a known field"):
        table.read(body)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
@pytest.mark.parametrize(
    "label",
    [
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "GET /v1/models/{model}",
        "POST /tokenize",
        "POST /detokenize",
    ],
)
def test_no_generated_request_breaks_the_server(
    base_url: str, label: str, mode: schemathesis.GenerationMode
) -> None:
    document = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    found: list[Any] = list(document.get_all_operations())
    operation = next(item.ok() for item in found if item.ok().label == label)

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Case[Any]) -> None:
        if isinstance(case.body, dict):
            # What an answer costs is not what is tested here.
            for name in ("n", "max_tokens", "max_completion_tokens"):
                value = case.body.get(name)
                if isinstance(value, int) and value > 2:
                    case.body[name] = 2
        case.validate_response(case.call(timeout=60), checks=CHECKS)

    check()
