"""`response_format` as an argument of generate, in every mode."""

import json

import numpy as np
import pytest

from qwen_runtime import LLM, RequestError

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "certain": {"type": "boolean"}},
    "required": ["answer", "certain"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "seed": 1, "temperature": 2.0},
        {"do_sample": True, "seed": 1, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "seed": 1, "num_beams": 2},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
)
def test_every_mode_keeps_to_the_format(embedded_llm, settings):
    outputs = embedded_llm.generate(
        [QUESTION], response_format=FORMAT, max_new_tokens=64, **settings
    )
    for output in outputs:
        assert output.finish_reason == "stop"
        answer = json.loads(output.text)
        assert isinstance(answer["answer"], int)
        assert isinstance(answer["certain"], bool)


def test_a_draft_model_keeps_to_the_format_and_changes_nothing(embedded_llm, draft_bundle):
    plain = embedded_llm.generate(
        QUESTION, response_format=FORMAT, max_new_tokens=64, do_sample=False
    )
    with LLM(draft_bundle) as draft:
        assisted = embedded_llm.generate(
            QUESTION,
            response_format=FORMAT,
            max_new_tokens=64,
            do_sample=False,
            assistant_model=draft,
        )
    assert assisted.token_ids == plain.token_ids


def test_a_padded_batch_answers_like_each_row_alone(embedded_llm):
    questions = [QUESTION, [{"role": "user", "content": "Say hello to my sister."}]]
    rows = [embedded_llm.encode(question) for question in questions]
    width = max(map(len, rows))
    ids = np.array([[4093] * (width - len(row)) + row for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = {
        "response_format": FORMAT,
        "max_new_tokens": 64,
        "do_sample": False,
        "repetition_penalty": 1.0,
    }
    batch = embedded_llm.generate(ids, attention_mask=mask, **settings)
    alone = embedded_llm.generate(questions, **settings)
    assert [row.text for row in batch.outputs] == [row.text for row in alone]


def test_a_stream_keeps_to_the_format(embedded_llm):
    stream = embedded_llm.stream(QUESTION, response_format=FORMAT, max_new_tokens=64, seed=2)
    assert set(json.loads("".join(stream))) == {"answer", "certain"}


def test_a_format_for_a_bundle_without_tokenizer_is_refused(tiny_llm):
    with pytest.raises(RequestError, match="response_format needs a tokenizer") as caught:
        tiny_llm.generate([1, 2, 3], response_format=FORMAT, max_new_tokens=4)
    assert caught.value.param == "response_format"


def test_an_unknown_format_is_refused_before_anything_runs(embedded_llm):
    with pytest.raises(RequestError, match="response_format type must be one of text, json_ob"):
        embedded_llm.generate(QUESTION, response_format={"type": "xml"})
