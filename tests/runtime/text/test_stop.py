import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime.errors import RequestError
from qwen_runtime.text import StopMatch, StopStringMatcher, Tokenizer

# Few letters, so that stop strings overlap each other and themselves.
STOP_STRINGS = st.lists(
    st.one_of(
        st.text("st", min_size=1, max_size=5),
        st.text("stop", min_size=1, max_size=5),
        st.text("aé好😀\n ", min_size=1, max_size=3),
        st.sampled_from(["<|im_end|>", "|>s", "hello", "lo w", "the ", "\ufffd"]),
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def token_ids(draw, tokenizer):
    """Ids of text in the stop strings' letters, with any token and unknown ids in between."""
    parts = st.one_of(
        st.text("st", max_size=8).map(tokenizer.encode),
        st.text("stopaé好😀\n ", max_size=6).map(tokenizer.encode),
        st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=2),
        st.sampled_from(["<|im_end|>", "hello world", "the stop"]).map(tokenizer.encode),
    )
    return [i for part in draw(st.lists(parts, max_size=8)) for i in part]


def oracle(tokenizer, stop_strings, ids):
    """Every occurrence that ends in the last token, by looking at each; first end, then start."""
    if not ids or not tokenizer.token_bytes(ids[-1]):
        return None
    unknown = [n for n, i in enumerate(ids) if not tokenizer.token_bytes(i)]
    ids = ids[unknown[-1] + 1 :] if unknown else ids
    last = len(tokenizer.token_bytes(ids[-1]))
    raw = b"".join(tokenizer.token_bytes(i) for i in ids)
    found = []
    for stop_string in stop_strings:
        pattern = stop_string.encode()
        for start in range(len(raw)):
            end = start + len(pattern)
            if raw[start:end] == pattern and len(raw) - last < end:
                found.append((end, start, stop_string))
    if not found:
        return None
    end, start, stop_string = min(found)
    return StopMatch(stop_string, end - start, len(raw) - end)


def test_matches_equal_the_recorded_ones_at_every_prefix(tokenizer, golden):
    cases = golden["text"]["stop_strings"]
    assert len(cases) == 22
    for case in cases:
        matcher = StopStringMatcher(tokenizer, case["stop_strings"])
        ids = case["ids"]
        matched = [matcher.match(ids[:end]) is not None for end in range(1, len(ids) + 1)]
        assert matched == case["matched_at_prefix"]
        cursor = matcher.cursor()
        assert [cursor.push(i) is not None for i in ids] == case["matched_at_prefix"]


def test_recorded_generations_stop_where_transformers_stopped(tokenizer, golden_dir):
    cases = json.loads((golden_dir / "text_e2e.json").read_text(encoding="utf-8"))
    case = next(case for case in cases if case["name"] == "one_stop")
    matcher = StopStringMatcher(tokenizer, case["kwargs"]["stop_strings"])
    ids, num_prompt = case["sequences"][0], len(case["input_ids"][0])
    stops = [n for n in range(num_prompt + 1, len(ids) + 1) if matcher.match(ids[:n])]
    assert stops == [len(ids)]


@settings(max_examples=300)
@given(st.data(), STOP_STRINGS)
def test_match_equals_a_brute_force_search(tokenizer, data, stop_strings):
    ids = data.draw(token_ids(tokenizer))
    matcher = StopStringMatcher(tokenizer, stop_strings)
    cursor = matcher.cursor()
    for end in range(1, len(ids) + 1):
        expected = oracle(tokenizer, stop_strings, ids[:end])
        assert matcher.match(ids[:end]) == expected
        assert cursor.push(ids[end - 1]) == expected


@given(st.data(), STOP_STRINGS)
def test_match_equals_transformers(tokenizer, reference_tokenizer, data, stop_strings):
    import torch
    import transformers

    ids = data.draw(token_ids(tokenizer)) or [0]
    theirs = transformers.StopStringCriteria(reference_tokenizer, stop_strings)
    ours = StopStringMatcher(tokenizer, stop_strings)
    for end in range(1, len(ids) + 1):
        expected = bool(theirs(torch.tensor([ids[:end]]), None)[0])
        assert (ours.match(ids[:end]) is not None) == expected


@given(st.data(), STOP_STRINGS)
def test_a_cursor_begins_in_its_context(tokenizer, data, stop_strings):
    ids = data.draw(token_ids(tokenizer))
    start = data.draw(st.integers(0, len(ids)))
    matcher = StopStringMatcher(tokenizer, stop_strings)
    cursor = matcher.cursor(ids[:start])
    for end in range(start + 1, len(ids) + 1):
        assert cursor.push(ids[end - 1]) == matcher.match(ids[:end])


def test_the_match_names_the_string_its_length_and_the_overhang(tokenizer):
    matcher = StopStringMatcher(tokenizer, ["好", "lo"])
    assert matcher.match([259]) == StopMatch("lo", length_bytes=2, overhang_bytes=0)
    assert matcher.match([278, 254, 280]) == StopMatch("好", length_bytes=3, overhang_bytes=0)
    assert StopStringMatcher(tokenizer, "e").match([259]) == StopMatch("e", 1, overhang_bytes=3)


def test_the_string_complete_first_is_reported_and_the_longest_of_those(tokenizer):
    assert StopStringMatcher(tokenizer, ["llo", "el"]).match([259]).stop_string == "el"
    assert StopStringMatcher(tokenizer, ["lo", "ello", "o"]).match([259]).stop_string == "ello"
    assert StopStringMatcher(tokenizer, ["help", "el"]).match([259]).stop_string == "el"


def test_a_string_in_the_prompt_counts_only_if_a_new_token_completes_it(tokenizer):
    matcher = StopStringMatcher(tokenizer, "stop")
    assert matcher.match([262]) is not None
    assert matcher.match([262, 81]) is None
    assert matcher.cursor([260]).push(tokenizer.encode("o")[0]) is None
    assert matcher.cursor(tokenizer.encode("sto")).push(79) == StopMatch("stop", 4, 0)


def test_an_unknown_id_parts_what_surrounds_it(tokenizer):
    matcher = StopStringMatcher(tokenizer, "stop")
    assert matcher.match([260, 78, 300, 79]) is None
    assert matcher.cursor([260, 78, 300]).push(79) is None
    assert matcher.match([260, 78, 79]) is not None


def test_match_takes_numpy_ids_and_the_empty_sequence(tokenizer):
    matcher = StopStringMatcher(tokenizer, "lo")
    assert matcher.match(np.array([220, 259], dtype=np.int64)) == StopMatch("lo", 2, 0)
    assert matcher.match([]) is None


def test_a_copied_cursor_goes_its_own_way(tokenizer):
    cursor = StopStringMatcher(tokenizer, "stop").cursor(tokenizer.encode("sto"))
    twin = cursor.copy()
    assert twin.pending_bytes == cursor.pending_bytes == 3
    assert cursor.push(0) is None
    assert (cursor.pending_bytes, twin.pending_bytes) == (0, 3)
    assert twin.push(79) is not None


@pytest.mark.parametrize(
    ("stop_strings", "message"),
    [
        ("", "a stop string must not be empty"),
        (["stop", ""], "a stop string must not be empty"),
        ([], "at least one string, got none"),
        ([3], "must hold strings, got int"),
        ([True], "must hold strings, got bool"),
        ([None], "must hold strings, got NoneType"),
        (["\ud800"], r"valid Unicode, but '\\ud800' holds half of a surrogate pair"),
    ],
)
def test_wrong_stop_strings_are_refused(tokenizer, stop_strings, message):
    with pytest.raises(RequestError, match=message) as caught:
        StopStringMatcher(tokenizer, stop_strings)
    assert caught.value.param == "stop_strings"


@pytest.mark.parametrize("stop_strings", [3, None, b"stop", {"stop": 1}])
def test_stop_strings_that_are_no_list_are_refused(tokenizer, stop_strings):
    with pytest.raises(RequestError, match="stop_strings must be a string or a list of strings"):
        StopStringMatcher(tokenizer, stop_strings)


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory, golden_dir):
    """Tokens "ab", "cd", "bc" and "x" only: many texts are out of reach."""
    data = json.loads((golden_dir / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    data["added_tokens"] = []
    data["model"].update(vocab={"ab": 0, "cd": 1, "bc": 2, "x": 3}, merges=[])
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    path.write_text(json.dumps(data))
    return Tokenizer(path)


@settings(max_examples=200)
@given(st.text("abcdx", min_size=1, max_size=6))
def test_a_stop_string_is_refused_just_when_no_tokens_contain_it(small_tokenizer, stop_string):
    reachable = any(stop_string in text for text in _texts(len(stop_string)))
    if reachable:
        assert StopStringMatcher(small_tokenizer, stop_string).stop_strings == (stop_string,)
    else:
        with pytest.raises(RequestError, match="no sequence of this tokenizer's tokens contains"):
            StopStringMatcher(small_tokenizer, stop_string)


_TEXTS = {}


def _texts(length):
    """All texts of up to ``length`` + 1 tokens: more can't touch a string of that length."""
    if length not in _TEXTS:
        rows = [""]
        for _ in range(min(length, 6) + 1):
            rows = [row + token for row in rows for token in ("ab", "cd", "bc", "x")]
            rows = list({row[-(length + 1) :] if len(row) > 12 else row for row in rows})
        _TEXTS[length] = rows
    return _TEXTS[length]


def test_a_long_stop_string_costs_no_more_per_token(tokenizer):
    matcher = StopStringMatcher(tokenizer, ["st" * 20_000, "ts" * 20_000, "stop!"])
    cursor = matcher.cursor([260] * 1000)
    started = time.perf_counter()
    for _ in range(5000):
        assert cursor.push(260) is None
    assert (time.perf_counter() - started) / 5000 < 100e-6
