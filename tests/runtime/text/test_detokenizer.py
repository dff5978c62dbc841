import itertools
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen_runtime.text import IncrementalDetokenizer

TRICKY = [
    "😀", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "你好", "日本語テキスト", "한국어", "e\u0301\u0323", "नि", "\u200d", "\ufe0f",
    "\x00", "\x1b[0m", "\r\n", "\ufffd", "<|im_end|>", "<|endoftext|>", "<think>", "plain words ",
]  # fmt: skip


@st.composite
def token_ids(draw, tokenizer):
    """Ids of tricky text, cut anywhere, mixed with any token, special token and unknown id."""
    parts = draw(
        st.lists(
            st.one_of(
                st.sampled_from(TRICKY).map(tokenizer.encode),
                st.text(st.characters(exclude_categories=["Cs"]), max_size=4).map(
                    tokenizer.encode
                ),
                st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=4),
                st.sampled_from([[i] for i in sorted(tokenizer.special_ids)]),
            ),
            max_size=8,
        )
    )
    ids = [token_id for part in parts for token_id in part]
    start = draw(st.integers(0, len(ids)))
    return ids[start:]


@st.composite
def cut(draw, items):
    """Cut a list into any pieces, empty ones included."""
    sizes = [*draw(st.lists(st.integers(0, 4), max_size=4)), 1]
    turns = itertools.cycle(sizes)
    pieces, rest = [], list(items)
    while rest:
        size = next(turns)
        pieces.append(rest[:size])
        rest = rest[size:]
    return pieces


@given(st.data(), st.booleans())
def test_joined_pieces_equal_the_full_decode(tokenizer, data, skip):
    _check_join(tokenizer, data, skip)


@given(st.data(), st.booleans())
def test_joined_pieces_equal_the_full_decode_of_the_embedded_model(
    chat_model_tokenizer, data, skip
):
    _check_join(chat_model_tokenizer, data, skip)


def _check_join(tokenizer, data, skip):
    ids = data.draw(token_ids(tokenizer))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.push(piece) for piece in data.draw(cut(ids))]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip)


@given(st.data())
def test_what_was_returned_never_changes(tokenizer, data):
    ids = data.draw(token_ids(tokenizer))
    detokenizer = IncrementalDetokenizer(tokenizer)
    shown = ""
    for position, token_id in enumerate(ids, start=1):
        shown += detokenizer.push([token_id])
        decoded = tokenizer.decode(ids[:position], skip_special_tokens=True)
        # All that is decoded so far is shown, but for one character that may still grow.
        assert decoded in (shown, shown + "\ufffd")


@given(st.data(), st.booleans())
@example(data=None, skip=True)
def test_context_is_not_returned_but_its_last_character_is_completed(tokenizer, data, skip):
    if data is None:
        context, ids = [281, 246], [222, 259]
    else:
        context, ids = data.draw(token_ids(tokenizer)), data.draw(token_ids(tokenizer))
    whole = IncrementalDetokenizer(tokenizer, skip)
    before = whole.push(context)
    detokenizer = IncrementalDetokenizer(tokenizer, skip, context_ids=context)
    text = detokenizer.push(ids) + detokenizer.flush()
    assert before + text == tokenizer.decode([*context, *ids], skip)


def test_an_emoji_appears_with_its_last_byte(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in (281, 246, 222)] == ["", "", "😀"]


def test_a_special_token_inside_a_character_is_skipped_or_breaks_it(tokenizer):
    ids = [278, 282, 254]
    assert IncrementalDetokenizer(tokenizer).push(ids) == "你"
    kept = IncrementalDetokenizer(tokenizer, skip_special_tokens=False).push(ids)
    assert kept == "\ufffd<|im_end|>\ufffd" == tokenizer.decode(ids)


def test_flush_shows_an_unfinished_character_once_and_starts_afresh(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push([278]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""
    assert detokenizer.push([259]) == "hello"


@pytest.mark.parametrize("context", [[], [259] * 200_000])
def test_a_token_costs_the_same_after_a_long_text(tokenizer, context):
    started = time.perf_counter()
    detokenizer = IncrementalDetokenizer(tokenizer, context_ids=context)
    detokenizer.push([259])
    assert time.perf_counter() - started < 0.05  # 200,000 tokens take longer to decode
    detokenizer.push([259] * 50_000)
    started = time.perf_counter()
    for _ in range(1000):
        detokenizer.push([259])
    assert (time.perf_counter() - started) / 1000 < 100e-6
