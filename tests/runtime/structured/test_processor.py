"""The mask itself: rows that move, shorten and end, and scores that are left alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime.errors import RequestError
from qwen_runtime.generation_config import GenerationConfig, resolve
from qwen_runtime.structured import (
    GrammarCompiler,
    StructuredOutputLogitsProcessor,
    structured_output_processor,
)

EOS, PAD, START = 4095, 4093, 4094
INF = np.float32(np.inf)


@pytest.fixture(scope="module")
def digits(compiler):
    return compiler.compile({"type": "regex", "pattern": "[0-9]{2,4}"})


@pytest.fixture(scope="module")
def objects(compile_schema):
    return compile_schema(
        {
            "type": "object",
            "properties": {"a": {"type": "array", "items": {"type": "string"}}},
            "required": ["a"],
            "additionalProperties": False,
        }
    )


def scores_of(rows=1, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 4096), dtype=np.float32)


def test_scores_of_allowed_tokens_stay_and_all_others_are_removed(digits, tokenizer):
    scores = scores_of()
    before = scores.copy()
    masked = StructuredOutputLogitsProcessor(digits, 0, EOS)(np.zeros((1, 0), np.int64), scores)
    left = np.flatnonzero(masked[0] > -INF)
    assert left.size
    assert all(tokenizer.decode([int(i)]).isdigit() for i in left)
    assert np.array_equal(masked[0, left], scores[0, left])
    assert np.array_equal(scores, before)
    assert masked.dtype == np.float32


def test_the_grammar_starts_behind_the_prompt(digits, tokenizer, allowed):
    prompt = "anything {"
    processor = StructuredOutputLogitsProcessor(digits, len(tokenizer.encode(prompt)), EOS)
    assert "7" in allowed(processor, prompt)
    assert "<|im_end|>" not in allowed(processor, prompt)


def test_end_tokens_are_allowed_exactly_where_the_answer_may_end(digits, allowed):
    processor = StructuredOutputLogitsProcessor(digits, 0, [EOS, PAD])
    ends = {"<|im_end|>", "<|endoftext|>"}
    assert not ends & allowed(processor, "1")
    assert allowed(processor, "12") > ends
    assert allowed(processor, "1234") == ends


def test_every_end_token_of_the_request_counts_even_an_ordinary_one(digits, tokenizer, allowed):
    (seven,) = tokenizer.encode("7")
    processor = StructuredOutputLogitsProcessor(digits, 0, [seven])
    assert "7" not in allowed(processor, "1")
    assert "7" in allowed(processor, "12")
    assert allowed(processor, "127") == {"7"}


def test_special_tokens_are_never_part_of_an_answer(compiler, allowed):
    grammar = compiler.compile({"type": "regex", "pattern": r"(.|\n)*"})
    left = allowed(StructuredOutputLogitsProcessor(grammar, 0, EOS))
    assert "<|im_end|>" in left
    assert not {"<|im_start|>", "<|endoftext|>"} & left


def test_ids_beyond_the_tokenizer_are_never_allowed(tokenizer):
    for vocab_size in (4097, 4099, 4104, 4160):
        compiler = GrammarCompiler(tokenizer, vocab_size)
        grammar = compiler.compile({"type": "regex", "pattern": r"(.|\n)*"})
        processor = StructuredOutputLogitsProcessor(grammar, 0, EOS)
        masked = processor(np.zeros((1, 0), np.int64), np.zeros((1, vocab_size), np.float32))
        assert masked.shape == (1, vocab_size)
        assert (masked[0, 4096:] == -INF).all()
        assert masked[0, EOS] == 0


def test_scores_that_are_infinite_or_nan_are_masked_too(digits, tokenizer):
    (seven,) = tokenizer.encode("7")
    scores = scores_of()
    scores[0, [0, seven]] = INF, np.nan
    masked = StructuredOutputLogitsProcessor(digits, 0, EOS)(np.zeros((1, 0), np.int64), scores)
    assert masked[0, 0] == -INF
    assert np.isnan(masked[0, seven])


def test_a_complete_answer_ends_though_the_end_was_removed(digits, tokenizer):
    scores = scores_of()
    scores[0, EOS] = -INF
    ids = np.array([tokenizer.encode("1234")])
    masked = StructuredOutputLogitsProcessor(digits, 0, EOS)(ids, scores)
    assert np.flatnonzero(masked[0] > -INF).tolist() == [EOS]


def test_rows_that_ended_or_left_the_grammar_get_end_tokens_only(digits, tokenizer):
    one, two, x = (tokenizer.encode(text)[0] for text in ("1", "2", "x"))
    ids = np.array([[one, two, EOS, PAD], [one, EOS, PAD, PAD], [one, x, two, two]])
    masked = StructuredOutputLogitsProcessor(digits, 0, EOS)(ids, scores_of(3))
    assert [np.flatnonzero(row > -INF).tolist() for row in masked] == [[EOS]] * 3


def test_settings_that_remove_all_that_is_allowed_are_an_error(digits):
    scores = scores_of()
    scores[0, :4000] = -INF
    with pytest.raises(RequestError, match="other settings removed every token") as caught:
        StructuredOutputLogitsProcessor(digits, 0, EOS)(np.zeros((1, 0), np.int64), scores)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("eos", [[], -1, [4096]])
def test_a_request_without_an_end_token_is_refused(digits, eos):
    with pytest.raises(RequestError, match="needs an end token") as caught:
        StructuredOutputLogitsProcessor(digits, 0, eos)
    assert caught.value.param == "eos_token_id"


@pytest.mark.parametrize("length", [-1, True, 1.0])
def test_the_prompt_length_must_be_a_count(digits, length):
    with pytest.raises(RequestError, match="prompt_length must be an integer >= 0"):
        StructuredOutputLogitsProcessor(digits, length, EOS)


def test_scores_of_another_vocabulary_are_refused(digits):
    with pytest.raises(RequestError, match="the grammar's 4096 tokens, got 5"):
        StructuredOutputLogitsProcessor(digits, 0, EOS)(
            np.zeros((1, 0), np.int64), np.zeros((1, 5), np.float32)
        )


ANSWERS = ['{"a": ["x", "yz"]}', '{"a": []}', '{"a":["日本"]}', '{"b": 1}', "{", '{"a": ["x", 1']


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.lists(st.tuples(st.sampled_from(ANSWERS), st.integers(0, 12)), min_size=1, max_size=4),
        min_size=1,
        max_size=12,
    )
)
def test_any_order_of_calls_gives_the_masks_of_fresh_processors(calls, objects, tokenizer):
    lasting = StructuredOutputLogitsProcessor(objects, 1, EOS)
    for call in calls:
        rows = [tokenizer.encode(text)[:length] for text, length in call]
        length = max(map(len, rows))
        rows = [[START, *row, *[EOS] * (length - len(row))] for row in rows]
        ids, scores = np.array(rows), scores_of(len(rows))
        expected = [
            StructuredOutputLogitsProcessor(objects, 1, EOS)(ids[i : i + 1], scores[i : i + 1])[0]
            for i in range(len(rows))
        ]
        assert np.array_equal(lasting(ids, scores), np.stack(expected))


def test_beams_that_fork_swap_and_die_keep_their_masks(objects, tokenizer):
    rng = np.random.default_rng(0)
    processor = StructuredOutputLogitsProcessor(objects, 0, EOS)
    ids = np.zeros((4, 0), np.int64)
    for step in range(40):
        scores = scores_of(4, step)
        masked = processor(ids, scores)
        alone = [
            StructuredOutputLogitsProcessor(objects, 0, EOS)(ids[r : r + 1], scores[r : r + 1])
            for r in range(4)
        ]
        assert np.array_equal(masked, np.concatenate(alone))
        parents = rng.integers(0, 4, 4)
        tokens = [rng.choice(np.flatnonzero(masked[p] > -INF)) for p in parents]
        ids = np.concatenate([ids[parents], np.array(tokens)[:, None]], axis=1)
    assert len(processor._states) <= 32


def test_a_step_costs_one_token_and_a_fork_no_replay(objects, tokenizer, monkeypatch):
    taken = []
    processor = StructuredOutputLogitsProcessor(objects, 0, EOS)
    advance = type(processor._replayed(np.zeros(0, np.int64))).advance
    monkeypatch.setattr(
        "qwen_runtime.structured.processor._State.advance",
        lambda state, ids, eos: (taken.append(len(ids)), advance(state, ids, eos))[1],
    )
    answer = tokenizer.encode('{"a": ["xyz", "xyz"]}')
    for length in range(len(answer)):
        processor(np.array([answer[:length]] * 2), scores_of(2))
    assert max(taken) == 1
    assert len(taken) == len(answer)  # two equal rows are one state
    processor(np.array([answer[:8]]), scores_of())
    assert taken[-1] == 0  # a rejected draft is rolled back, not replayed


def resolved(**settings):
    return resolve(
        None,
        GenerationConfig(eos_token_id=[EOS, PAD]),
        {"max_new_tokens": 5, **settings},
        prompt_length=3,
        vocab_size=4096,
        max_position_embeddings=64,
        has_tokenizer=True,
    )


def test_a_request_s_processor_has_its_prompt_length_and_end_tokens(digits):
    processor = structured_output_processor(digits, resolved())
    assert (processor.prompt_length, processor.eos_token_id) == (3, [EOS, PAD])


@pytest.mark.parametrize("name", ["forced_bos_token_id", "forced_eos_token_id"])
def test_a_setting_that_forces_tokens_is_refused(digits, name):
    with pytest.raises(RequestError, match=f"{name} forces a token") as caught:
        structured_output_processor(digits, resolved(**{name: 5}))
    assert caught.value.param == name


def test_a_grammar_that_grows_beyond_its_limits_says_so(compiler, tokenizer):
    pattern = "((a|b|ab|ba){1,3000}){1,3000}c"
    grammar = compiler.compile({"type": "regex", "pattern": pattern})
    ids = np.array([tokenizer.encode("ab" * 50)])

    def replay():
        processor = StructuredOutputLogitsProcessor(grammar, 0, EOS)
        for length in range(ids.shape[1]):
            processor(ids[:, :length], scores_of())

    with pytest.raises(RequestError, match="became too complex") as caught:
        replay()
    assert caught.value.param == "response_format"
    assert "\n" not in str(caught.value)
