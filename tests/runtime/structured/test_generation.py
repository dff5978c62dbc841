"""The embedded model held to a format: every answer that ended is one of the format."""

import json
import re

import jsonschema
import numpy as np
import pytest

from qwen_runtime.structured import GrammarCompiler, StructuredOutputLogitsProcessor

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["good", "bad", None]},
        "scores": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "own": {"type": "boolean"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "mood", "scores", "home"],
    "additionalProperties": False,
}
FORMATS = {
    "object": {"type": "json_object"},
    "schema": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}},
    "list": {
        "type": "json_schema",
        "json_schema": {"schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 4}},
    },
    "regex": {"type": "regex", "pattern": r"[0-9]{3}-[a-f]{1,5}"},
    "choice": {"type": "choice", "choices": ["positive", "negative", 'it\'s "neutral"', "日本"]},
}
QUESTIONS = ["What is 17 + 25?", "Who are you and what can you do?", "Tell me about Ada."]
HOT = {"do_sample": True, "temperature": 3.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="session")
def prompts(embedded_llm):
    """Token ids of chat prompts of different lengths."""
    return [
        embedded_llm.tokenizer.encode(
            embedded_llm.chat_template.render(
                [{"role": "user", "content": question}], add_generation_prompt=True
            )
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="session")
def hold(embedded_llm):
    """Makes the processor of one prompt length."""
    compiler = GrammarCompiler(
        embedded_llm.tokenizer, embedded_llm.bundle.manifest.model.vocab_size
    )
    eos = embedded_llm.generation_config.eos_token_id

    def held(name, prompt_length):
        return [
            StructuredOutputLogitsProcessor(compiler.compile(FORMATS[name]), prompt_length, eos)
        ]

    return held


def require(name, text):
    """Check a whole answer against its format, independently of the grammar."""
    if name == "regex":
        assert re.fullmatch(FORMATS[name]["pattern"], text)
    elif name == "choice":
        assert text in FORMATS[name]["choices"]
    else:
        schema = FORMATS[name].get("json_schema", {}).get("schema", {"type": "object"})
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("name", FORMATS)
def test_a_greedy_answer_is_of_the_format(name, embedded_llm, prompts, hold):
    output = embedded_llm.generate(
        prompts[0], max_new_tokens=120, logits_processor=hold(name, len(prompts[0])), top_k=None,
        do_sample=False, temperature=None, top_p=None,
    )  # fmt: skip
    assert output.finish_reason == "stop"
    require(name, output.text)


def test_without_the_processor_the_answer_is_another(embedded_llm, prompts):
    text = embedded_llm.generate(prompts[0], max_new_tokens=120, seed=0).text
    for name in FORMATS:
        with pytest.raises((AssertionError, ValueError)):
            require(name, text)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("settings", [{}, HOT], ids=["defaults", "hot"])
def test_sampled_answers_that_ended_are_of_the_format(name, settings, embedded_llm, prompts, hold):
    ended = 0
    for seed in range(4):
        prompt = prompts[seed % 3]
        output = embedded_llm.generate(
            prompt, max_new_tokens=100, seed=seed, logits_processor=hold(name, len(prompt)),
            **settings,
        )  # fmt: skip
        if output.finish_reason == "stop":
            ended += 1
            require(name, output.text)
    assert ended or (name, settings) == ("object", HOT)  # any object may go on for long


def test_hot_strings_hold_any_text_and_still_parse(embedded_llm, prompts, compile_schema):
    grammar = compile_schema({"type": "string", "minLength": 8, "maxLength": 16})
    texts = []
    for seed in range(8):
        processor = StructuredOutputLogitsProcessor(grammar, len(prompts[0]), [4095, 4093])
        output = embedded_llm.generate(
            prompts[0], max_new_tokens=80, seed=seed, logits_processor=[processor], **HOT
        )
        assert output.finish_reason == "stop"
        texts.append(json.loads(output.text))
    assert all(8 <= len(text) <= 16 for text in texts)
    assert any(ord(character) > 127 for text in texts for character in text)


def test_an_answer_cut_by_its_length_is_the_beginning_of_one(
    embedded_llm, prompts, hold, compiler
):
    output = embedded_llm.generate(
        prompts[0], max_new_tokens=7, seed=1, logits_processor=hold("schema", len(prompts[0]))
    )
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 7
    matcher = compiler.compile(FORMATS["schema"]).matcher()
    assert matcher.try_consume_tokens(output.token_ids) == 7
    assert not matcher.is_accepting()


def test_several_sequences_of_a_prompt_are_all_of_the_format(embedded_llm, prompts, hold):
    outputs = embedded_llm.generate(
        prompts[0], max_new_tokens=100, num_return_sequences=4, seed=3,
        logits_processor=hold("schema", len(prompts[0])), **HOT,
    )  # fmt: skip
    assert len({output.text for output in outputs}) == 4
    for output in outputs:
        assert output.finish_reason == "stop"
        require("schema", output.text)


def test_a_list_of_prompts_is_answered_in_the_format(embedded_llm, prompts, hold):
    length = min(map(len, prompts))
    same_length = [prompt[-length:] for prompt in prompts]
    outputs = embedded_llm.generate(
        same_length, max_new_tokens=100, seed=5, logits_processor=hold("schema", length)
    )
    for output in outputs:
        assert output.finish_reason == "stop"
        require("schema", output.text)


@pytest.mark.parametrize("name", ["schema", "choice"])
def test_a_left_padded_batch_is_answered_as_its_rows_alone(name, embedded_llm, prompts, hold):
    width = max(map(len, prompts))
    ids = np.full((3, width), 4093)
    mask = np.zeros((3, width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    batch = embedded_llm.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=100,
        logits_processor=hold(name, width), **greedy,
    )  # fmt: skip
    for prompt, output in zip(prompts, batch.outputs, strict=True):
        require(name, output.text)
        alone = embedded_llm.generate(
            prompt, max_new_tokens=100, logits_processor=hold(name, len(prompt)), **greedy
        )
        assert output.token_ids == alone.token_ids


def test_scores_show_the_mask(embedded_llm, prompts, hold):
    output = embedded_llm.generate(
        prompts[0], max_new_tokens=3, seed=0, logits_processor=hold("list", len(prompts[0])),
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    assert embedded_llm.tokenizer.decode(output.token_ids).startswith("[")
    assert (output.scores[0] > -np.inf).sum() < 10
    assert np.isfinite(output.logits[0]).all()


@pytest.mark.parametrize("seed", [None, 0])
def test_beams_stay_in_the_format(seed, embedded_llm, prompts, hold):
    sampled = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    outputs = embedded_llm.generate(
        prompts[0], max_new_tokens=60, num_beams=3, num_return_sequences=3,
        logits_processor=hold("list", len(prompts[0])),
        **(sampled if seed is None else {"seed": seed}),
    )  # fmt: skip
    assert len(outputs) == 3
    for output in outputs:
        if output.finish_reason == "stop":
            require("list", output.text)


def test_prompt_lookup_stays_in_the_format_and_changes_nothing(embedded_llm, prompts, hold):
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    plain, looked_up = (
        embedded_llm.generate(
            prompts[0], max_new_tokens=80, logits_processor=hold("schema", len(prompts[0])),
            **greedy, **more,
        )
        for more in ({}, {"prompt_lookup_num_tokens": 4})
    )  # fmt: skip
    assert looked_up.token_ids == plain.token_ids
    require("schema", looked_up.text)
