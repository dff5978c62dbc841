from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime.text import (
    IncrementalDetokenizer,
    StoppingDetokenizer,
    StopStringMatcher,
    trim_stop_string,
)

LETTERS = "stopé好😀 "
STOP_STRINGS = st.lists(
    st.one_of(
        st.text(LETTERS, min_size=1, max_size=4),
        st.text("st", min_size=1, max_size=4),
        st.sampled_from(["<|im_end|>", "p<|im_end|>", "|>s", "lo w"]),
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def token_ids(draw, tokenizer):
    parts = st.one_of(
        st.text(LETTERS, max_size=5).map(tokenizer.encode),
        st.text("st", max_size=5).map(tokenizer.encode),
        st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=2),
        st.sampled_from(["<|im_end|>", "hello world"]).map(tokenizer.encode),
    )
    return [i for part in draw(st.lists(parts, max_size=6)) for i in part]


def _stop(matcher, prompt, generated):
    """The generated ids up to the first match, and the match."""
    for end in range(1, len(generated) + 1):
        match = matcher.match([*prompt, *generated[:end]])
        if match is not None:
            return generated[:end], match
    return generated, None


@settings(max_examples=300)
@given(st.data(), STOP_STRINGS, st.booleans())
def test_streamed_text_equals_the_finished_text(tokenizer, data, stop_strings, skip):
    matcher = StopStringMatcher(tokenizer, stop_strings)
    prompt = tokenizer.encode(data.draw(st.text("stop", max_size=3)))
    generated = data.draw(token_ids(tokenizer))
    stopped, match = _stop(matcher, prompt, generated)
    if match is None:
        expected = tokenizer.decode(generated, skip)
    else:
        expected = trim_stop_string(tokenizer, stopped, match, skip)
    size = data.draw(st.integers(1, 3))
    stream = StoppingDetokenizer(tokenizer, matcher, skip_special_tokens=skip, context_ids=prompt)
    pieces = [stream.push(generated[n : n + size]) for n in range(0, len(generated), size)]
    assert "".join(pieces) + stream.flush() == expected
    assert stream.match == match


@given(st.data(), STOP_STRINGS)
def test_trimmed_text_is_what_stands_before_the_first_stop_string(tokenizer, data, stop_strings):
    matcher = StopStringMatcher(tokenizer, stop_strings)
    text = data.draw(st.text(LETTERS, max_size=12))
    stopped, match = _stop(matcher, [], tokenizer.encode(text))
    ends = [text.index(s) + len(s) for s in stop_strings if s in text]
    if not ends:
        assert match is None
        return
    start = min(text.index(s) for s in stop_strings if text[: min(ends)].endswith(s))
    assert trim_stop_string(tokenizer, stopped, match) == text[:start]


@given(st.data(), STOP_STRINGS)
def test_nothing_of_a_stop_string_is_ever_shown(tokenizer, data, stop_strings):
    matcher = StopStringMatcher(tokenizer, stop_strings)
    generated = data.draw(token_ids(tokenizer))
    stopped, match = _stop(matcher, [], generated)
    final = tokenizer.decode(generated, True)
    if match is not None:
        final = trim_stop_string(tokenizer, stopped, match)
    stream = StoppingDetokenizer(tokenizer, matcher)
    shown = ""
    for token_id in generated:
        shown += stream.push([token_id])
        assert final.startswith(shown)


@given(st.data(), STOP_STRINGS, st.booleans())
def test_untrimmed_text_is_that_of_the_plain_detokenizer(tokenizer, data, stop_strings, skip):
    matcher = StopStringMatcher(tokenizer, stop_strings)
    generated = data.draw(token_ids(tokenizer))
    plain = IncrementalDetokenizer(tokenizer, skip)
    stream = StoppingDetokenizer(tokenizer, matcher, trim=False, skip_special_tokens=skip)
    for token_id in generated:
        assert stream.push([token_id]) == plain.push([token_id])
    assert stream.flush() == plain.flush()
    assert stream.match == _stop(matcher, [], generated)[1]


def test_a_possible_beginning_is_held_until_the_next_token_decides(tokenizer):
    stream = StoppingDetokenizer(tokenizer, StopStringMatcher(tokenizer, "stop!"))
    assert [stream.push(tokenizer.encode(text)) for text in ("a st", "op", "s", "t")] == [
        "a ", "", "stop", "",
    ]  # fmt: skip
    assert stream.flush() == "st"
    assert stream.match is None


def test_text_in_the_last_token_after_the_stop_string_is_left_out(tokenizer):
    matcher = StopStringMatcher(tokenizer, "el")
    stream = StoppingDetokenizer(tokenizer, matcher)
    assert stream.push([220, 259]) == " h"
    assert stream.push([259]) == stream.flush() == ""
    assert trim_stop_string(tokenizer, [220, 259], stream.match) == " h"


def test_a_stop_string_that_begins_in_the_prompt_leaves_no_text(tokenizer):
    matcher = StopStringMatcher(tokenizer, "hello wor")
    stream = StoppingDetokenizer(tokenizer, matcher, context_ids=[259])
    assert stream.push([273]) == stream.flush() == ""
    assert trim_stop_string(tokenizer, [273], stream.match) == ""


def test_special_tokens_take_part_in_the_search_when_they_are_not_shown(tokenizer):
    matcher = StopStringMatcher(tokenizer, "p<|im_end|>")
    stream = StoppingDetokenizer(tokenizer, matcher)
    assert stream.push([262]) == "sto"
    assert stream.push([282]) == stream.flush() == ""
    assert trim_stop_string(tokenizer, [262, 282], stream.match) == "sto"


def test_an_unfinished_character_before_a_stop_string_is_shown_as_broken(tokenizer):
    matcher = StopStringMatcher(tokenizer, "stop")
    stream = StoppingDetokenizer(tokenizer, matcher)
    assert [stream.push([278]), stream.push([262])] == ["", "\ufffd"]
    assert stream.flush() == ""
    assert trim_stop_string(tokenizer, [278, 262], stream.match) == "\ufffd"
