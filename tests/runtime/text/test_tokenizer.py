import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_runtime.errors import BundleError, RequestError
from qwen_runtime.text import Tokenizer

IM_END, ENDOFTEXT = 282, 283


def test_encode_equals_the_recorded_ids(tokenizer, golden):
    cases = golden["text"]["encode"]
    assert [tokenizer.encode(case["text"]) for case in cases] == [case["ids"] for case in cases]
    assert tokenizer.encode_batch([case["text"] for case in cases]) == [c["ids"] for c in cases]


def test_decode_equals_the_recorded_text(tokenizer, golden):
    for case in golden["text"]["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["text_skip"]


def test_decode_equals_the_recorded_generations(tokenizer, golden_dir):
    for case in json.loads((golden_dir / "text_e2e.json").read_text(encoding="utf-8")):
        assert [tokenizer.decode(row) for row in case["sequences"]] == case["text"]


def test_vocab_size_counts_added_tokens(tokenizer, golden):
    assert tokenizer.vocab_size == golden["text"]["len"] == len(tokenizer.vocabulary_bytes())


def test_token_to_id_knows_special_tokens_and_nothing_else(tokenizer, golden):
    assert tokenizer.token_to_id("<|im_end|>") == golden["text"]["eos"]
    assert tokenizer.token_to_id("<|nobody|>") is None


def test_encode_batch_of_nothing_is_nothing(tokenizer):
    assert tokenizer.encode_batch([]) == []


def test_decode_takes_numpy_ids(tokenizer):
    assert tokenizer.decode(np.array([259, 273, 274], dtype=np.int64)) == "hello world"


@pytest.mark.parametrize("unknown", [-1, 289, 2**31, 2**32, 2**63])
def test_ids_outside_the_tokenizer_decode_to_nothing(tokenizer, unknown):
    assert tokenizer.decode([259, unknown, 273]) == "hello wor"
    assert tokenizer.token_bytes(unknown) == b""


def test_token_bytes_are_raw_for_byte_level_tokens_and_text_for_added_ones(tokenizer):
    assert tokenizer.token_bytes(278) == b"\xe4\xbd"
    assert tokenizer.token_bytes(220) == b" "
    assert tokenizer.token_bytes(IM_END) == b"<|im_end|>"


def test_token_bytes_of_an_added_token_out_of_the_byte_alphabet_are_utf8(tmp_path, golden_dir):
    path = _edited(tmp_path, golden_dir, lambda data: _add(data, 289, "日é"))
    tokenizer = Tokenizer(path)
    assert tokenizer.token_bytes(289) == "日é".encode()
    assert tokenizer.decode([289]) == "日é"


def test_vocabulary_bytes_hold_all_256_bytes(tokenizer):
    singles = {raw for raw in tokenizer.vocabulary_bytes().values() if len(raw) == 1}
    assert len(singles) == 256
    assert tokenizer.has_every_byte


def test_a_vocabulary_without_a_byte_is_not_complete(tmp_path, golden_dir):
    def drop_q(data):
        vocabulary = data["model"]["vocab"]
        vocabulary["unused"] = vocabulary.pop("q")

    assert not Tokenizer(_edited(tmp_path, golden_dir, drop_q)).has_every_byte


@given(st.lists(st.integers(0, 292), max_size=40), st.booleans())
def test_decoding_ids_equals_decoding_their_joined_bytes(tokenizer, ids, skip):
    kept = [i for i in ids if not (skip and i in tokenizer.special_ids)]
    joined = b"".join(tokenizer.token_bytes(i) for i in kept)
    assert tokenizer.decode(ids, skip) == joined.decode("utf-8", errors="replace")


def test_python_and_the_tokenizer_replace_the_same_malformed_utf8(tokenizer):
    # One byte of every class of Table 3-7 of the Unicode standard, in every order of four.
    classes = bytes.fromhex("41 80 8f 90 9f a0 bf c1 c2 e0 e1 ed ee f0 f1 f4 f5")
    id_of = {raw: i for i, raw in tokenizer.vocabulary_bytes().items() if len(raw) == 1}
    for sequence in itertools.product(classes, repeat=3):
        raws = [bytes([*sequence, last, 0x0A]) for last in classes]
        ids = [id_of[bytes([byte])] for raw in raws for byte in raw]
        assert tokenizer.decode(ids) == b"".join(raws).decode("utf-8", errors="replace")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_encode_equals_transformers(tokenizer, reference_tokenizer, text):
    assert tokenizer.encode(text) == reference_tokenizer.encode(text, add_special_tokens=False)


def test_special_token_text_becomes_its_id(tokenizer):
    assert tokenizer.encode("a<|im_end|>")[-1] == IM_END


def test_split_special_tokens_encodes_their_text_as_ordinary_text(golden_dir):
    path = golden_dir / "tokenizer" / "tokenizer.json"
    split = Tokenizer(path, split_special_tokens=True)
    ids = split.encode("a<|im_end|>")
    assert IM_END not in ids
    assert split.decode(ids) == "a<|im_end|>"


def test_a_named_special_token_becomes_special_as_in_transformers(tmp_path, golden_dir):
    def make_ordinary(data):
        for token in data["added_tokens"]:
            token["special"] = False

    path = _edited(tmp_path, golden_dir, make_ordinary)
    assert Tokenizer(path).special_ids == frozenset()
    named = Tokenizer(path, {"eos_token": "<|im_end|>", "bos_token": "hello"})
    assert named.special_ids == {IM_END, named.token_to_id("hello")}
    assert named.decode([259, IM_END, ENDOFTEXT], skip_special_tokens=True) == "<|endoftext|>"


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path, golden_dir):
    def limit(data):
        data["truncation"] = {
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        data["padding"] = {
            "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": ENDOFTEXT, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }  # fmt: skip

    limited = Tokenizer(_edited(tmp_path, golden_dir, limit))
    assert limited.encode("hello world") == [259, 273, 274]


def test_many_threads_may_share_a_tokenizer(tokenizer, golden):
    cases = golden["text"]["encode"] * 20

    def round_trip(case):
        raw = b"".join(tokenizer.token_bytes(i) for i in case["ids"])
        return tokenizer.encode(case["text"]), raw.decode("utf-8", "replace")

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(round_trip, cases))
    assert [ids for ids, _ in results] == [case["ids"] for case in cases]
    assert [text for _, text in results] == [tokenizer.decode(case["ids"]) for case in cases]


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(
        BundleError, match=r"nowhere.json: the tokenizer file is missing"
    ) as caught:
        Tokenizer(tmp_path / "nowhere.json")
    assert caught.value.path == tmp_path / "nowhere.json"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_broken_file_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json: must be a readable tokenizer\.json"):
        Tokenizer(path)


@pytest.mark.parametrize(("decoder", "kind"), [(None, "none"), ({"type": "Fuse"}, "Fuse")])
def test_another_decoder_than_byte_level_is_refused(tmp_path, golden_dir, decoder, kind):
    path = _edited(tmp_path, golden_dir, lambda data: data.update(decoder=decoder))
    with pytest.raises(BundleError, match=rf"decoder must be ByteLevel.*got {kind}"):
        Tokenizer(path)


def test_special_token_out_of_the_vocabulary_is_refused(golden_dir):
    path = golden_dir / "tokenizer" / "tokenizer.json"
    with pytest.raises(BundleError, match=r"but eos_token '<\|nobody\|>' is not"):
        Tokenizer(path, {"eos_token": "<|nobody|>"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (3, "text must be a string, got int"),
        (None, "text must be a string, got NoneType"),
        ("ab\ud800", r"character 2 is half of a surrogate pair \('\\ud800'\)"),
    ],
)
def test_text_that_is_no_text_is_refused(tokenizer, text, message):
    with pytest.raises(RequestError, match=message) as caught:
        tokenizer.encode(text)
    assert caught.value.param == "text"
    with pytest.raises(RequestError, match=message):
        tokenizer.encode_batch(["fine", text])


def _edited(tmp_path, golden_dir, edit):
    data = json.loads((golden_dir / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    edit(data)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def _add(data, token_id, content):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"].append({"id": token_id, "content": content, "special": False, **flags})
