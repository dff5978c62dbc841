from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen_export.checkpoint import ModelConfig, TokenizerFiles, read_tokenizer_files
from qwen_export.errors import CheckpointError, UnsupportedModelError

REPOSITORY = Path(__file__).parents[3]
EMBEDDED = REPOSITORY / "exporter/qwen_export/data/tiny-qwen2-chat"
GOLDEN = REPOSITORY / "tests/data/golden/tokenizer"
SETTINGS = "tokenizer_config.json"

TEXTS = (
    "",
    "Hello world, it's 2024!",
    "  leading,  double  and trailing blanks  \n\n\ttabs\r\n",
    "<|im_start|>user\nHi <|im_end|> <|endoftext|><|im_end|>\n",
    " <think>x</think> <tool_call>{}</tool_call><|img|> <|extra|>",
    "e\u0301 \u00e9 \ufb01 \u212b 日本語 カタカナ 한국어 مرحبا 👩‍👩‍👧 🇩🇪",
    "1234567890 3.14159 0x7f ²³ Ⅷ",
    "\x00\x07\u200b\ufeff\u2028 I'LL we've DON'T",
)

Edit = Callable[[dict[str, Any]], object]


def config(model_type: str = "qwen2") -> ModelConfig:
    return ModelConfig.from_dict({"model_type": model_type})


def assert_same(
    ours: TokenizerFiles, theirs: PreTrainedTokenizerBase, texts: tuple[str, ...] = TEXTS
) -> None:
    tokenizer = Tokenizer.from_str(ours.tokenizer_json)
    tokenizer.encode_special_tokens = ours.split_special_tokens
    for text in texts:
        for add in (False, True):
            expected = theirs(text, add_special_tokens=add).input_ids
            assert tokenizer.encode(text, add_special_tokens=add).ids == expected, (text, add)
        for skip in (False, True):
            decoded = tokenizer.decode(expected, skip_special_tokens=skip)
            assert decoded == theirs.decode(expected, skip_special_tokens=skip)


def flags(tokenizer: Tokenizer) -> dict[int, tuple[Any, ...]]:
    return {
        token_id: (t.content, t.special, t.lstrip, t.rstrip, t.normalized, t.single_word)
        for token_id, t in tokenizer.get_added_tokens_decoder().items()
    }


def make(
    folder: Path,
    *,
    vocabulary: bool = False,
    edit: Edit | None = None,
    edit_tokenizer: Edit | None = None,
    settings_file: bool = True,
    model_type: str = "qwen2",
    **files: Any,
) -> Path:
    """A model folder with the embedded tokenizer, changed."""
    folder.mkdir(exist_ok=True)
    names = ["vocab.json", "merges.txt"] if vocabulary else ["tokenizer.json"]
    for name in names:
        shutil.copy(EMBEDDED / name, folder)
    values = json.loads((EMBEDDED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "model_type": model_type}))
    for name, change, wanted in (
        (SETTINGS, edit, settings_file),
        ("tokenizer.json", edit_tokenizer, not vocabulary),
    ):
        if wanted:
            content = json.loads((EMBEDDED / name).read_text())
            if change is not None:
                change(content)
            (folder / name).write_text(json.dumps(content))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def without_decoder(values: dict[str, Any]) -> None:
    del values["added_tokens_decoder"]


def token(content: str, *, special: bool = False, **more: Any) -> dict[str, Any]:
    return {"content": content, "special": special, **more}


def in_decoder(**tokens: dict[str, Any]) -> Edit:
    return lambda values: values["added_tokens_decoder"].update(
        {token_id.removeprefix("t"): value for token_id, value in tokens.items()}
    )


def in_list(values: dict[str, Any]) -> None:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    values["added_tokens"].append({"id": 4096, "content": "<think>", "special": False, **plain})


def other_split(values: dict[str, Any]) -> None:
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}|\p{L}+|\s+"


def padded(values: dict[str, Any]) -> None:
    values["padding"] = {
        "strategy": {"Fixed": 12},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }


def sets(**changes: Any) -> Edit:
    return lambda values: values.update(changes)


def begins_with_bos(values: dict[str, Any]) -> None:
    first, text = (
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [4094], "tokens": ["<|im_start|>"]}
        },
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "vocabulary": {"vocabulary": True},
    "no settings": {"settings_file": False},
    "vocabulary, added_tokens.json": {
        "vocabulary": True,
        "edit": without_decoder,
        "added_tokens": {"<|endoftext|>": 4093, "<|im_start|>": 4094, "<|im_end|>": 4095},
    },
    "tokens only in the settings": {"edit": in_decoder(t4096=token("<think>"))},
    "tokens only in tokenizer.json": {"edit_tokenizer": in_list},
    "tokens only in tokenizer.json, no decoder": {
        "edit": without_decoder,
        "edit_tokenizer": in_list,
    },
    "other flags in the settings": {
        "edit": in_decoder(
            t4094=token("<|im_start|>", lstrip=True),
            t4095=token("<|im_end|>", special=True, rstrip=True, lstrip=True),
        )
    },
    "a special token said not to be": {"edit": in_decoder(t4095=token("<|im_end|>"))},
    "extra special token": {"edit": sets(additional_special_tokens=["<|extra|>"])},
    "extra special tokens by role": {"edit": sets(extra_special_tokens={"my_token": "<|img|>"})},
    "a role of its own": {"edit": sets(image_token="<|img|>")},
    "a role as an object": {
        "edit": sets(eos_token={"__type": "AddedToken", **token("<|im_end|>", special=True)})
    },
    "special_tokens_map.json": {
        "settings_file": False,
        "special_tokens_map": {
            "eos_token": "<|im_end|>",
            "pad_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": False},
            "additional_special_tokens": ["<|extra|>"],
        },
        "added_tokens": {"<think>": 4096},
    },
    "prefix space": {"edit": sets(add_prefix_space=True)},
    "split special tokens": {"edit": sets(split_special_tokens=True)},
    "bos, vocabulary": {
        "vocabulary": True,
        "edit": sets(add_bos_token=True, bos_token="<|im_start|>", add_eos_token=True),
    },
    "bos without effect": {"edit": sets(add_bos_token=True, bos_token="<|im_start|>")},
    "bos in the post-processor": {"edit_tokenizer": begins_with_bos},
    "another pipeline": {"edit_tokenizer": other_split},
    "padding": {"edit_tokenizer": padded},
    "another class, qwen2": {
        "edit": sets(tokenizer_class="LlamaTokenizerFast"),
        "edit_tokenizer": other_split,
    },
    "a special token said not to be, plain class": {
        "edit": lambda values: (
            sets(tokenizer_class="PreTrainedTokenizerFast")(values),
            in_decoder(t4095=token("<|im_end|>", rstrip=True))(values),
        ),
        "model_type": "qwen3",
    },
    "another class, qwen3": {
        "edit": sets(tokenizer_class="LlamaTokenizerFast"),
        "edit_tokenizer": other_split,
        "model_type": "qwen3",
    },
    "plain class, qwen3": {
        "edit": sets(tokenizer_class="PreTrainedTokenizerFast", bos_token="<|extra|>"),
        "edit_tokenizer": other_split,
        "model_type": "qwen3",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokenizer_equals_that_of_transformers(variant: str, tmp_path: Path) -> None:
    options = VARIANTS[variant]
    folder = make(tmp_path, **options)
    ours = read_tokenizer_files(folder, config(options.get("model_type", "qwen2")))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours is not None
    assert_same(ours, theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.split_special_tokens == theirs.split_special_tokens
    assert flags(Tokenizer.from_str(ours.tokenizer_json)) == flags(theirs.backend_tokenizer)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[TokenizerFiles, PreTrainedTokenizerBase]]:
    found = []
    for folder in (EMBEDDED, GOLDEN):
        ours = read_tokenizer_files(folder, config())
        assert ours is not None
        found.append((ours, AutoTokenizer.from_pretrained(folder)))
    return found


@given(text=st.text(max_size=40) | st.lists(st.sampled_from(TEXTS), max_size=3).map(" ".join))
@settings(max_examples=150, deadline=None)
def test_any_text_is_tokenized_as_transformers_does(
    text: str, pairs: list[tuple[TokenizerFiles, PreTrainedTokenizerBase]]
) -> None:
    for ours, theirs in pairs:
        assert_same(ours, theirs, (text,))


def test_settings_of_the_golden_and_embedded_tokenizers_are_read() -> None:
    golden = read_tokenizer_files(GOLDEN, config())
    embedded = read_tokenizer_files(EMBEDDED, config())
    assert golden is not None
    assert embedded is not None
    expected = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert golden.special_tokens == embedded.special_tokens == expected
    assert (golden.model_max_length, embedded.model_max_length) == (None, 2048)
    assert golden.chat_templates == {"default": (GOLDEN / "chat_template.jinja").read_text()}
    settings_text = json.loads((EMBEDDED / SETTINGS).read_text())["chat_template"]
    assert embedded.chat_templates == {"default": settings_text}


def test_vocabulary_without_any_list_of_tokens_gets_qwens_three(tmp_path: Path) -> None:
    folder = make(tmp_path, vocabulary=True, settings_file=False)
    files = read_tokenizer_files(folder, config())
    assert files is not None
    tokenizer = Tokenizer.from_str(files.tokenizer_json)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.token_to_id(name) for name in names] == [4093, 4094, 4095]


def test_checkpoint_without_tokenizer_gives_none(golden_models: Path) -> None:
    assert read_tokenizer_files(golden_models / "qwen2_tied", config()) is None


@pytest.mark.parametrize("kind", ["list", "string", "file", "more files", "only more files"])
def test_chat_templates_come_from_files_before_settings(kind: str, tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    folder = make(tmp_path, edit=sets(chat_template="s" if kind == "string" else listed))
    expected = {"default": "s"} if kind == "string" else {"default": "a", "tool_use": "b"}
    if kind in ("file", "more files"):
        (folder / "chat_template.jinja").write_text("f")
        expected = {"default": "f"}
    if "more" in kind:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/rag.jinja").write_text("r")
        expected = {**({} if kind.startswith("only") else {"default": "f"}), "rag": "r"}
    files = read_tokenizer_files(folder, config())
    assert files is not None
    assert files.chat_templates == expected
    theirs = AutoTokenizer.from_pretrained(folder).chat_template
    assert (theirs if isinstance(theirs, dict) else {"default": theirs}) == expected


@pytest.mark.parametrize("name", ["../../../evil", "/evil", "..", "-o", "a/b", "a\\b", "a\n", ""])
def test_template_name_that_is_no_plain_file_name_is_refused(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, edit=sets(chat_template=[{"name": name, "template": "a"}]))
    with pytest.raises(CheckpointError, match="the name of a chat template must be") as caught:
        read_tokenizer_files(folder, config())
    assert (caught.value.path, f"got {name!r}" in str(caught.value)) == (folder / SETTINGS, True)


def test_template_file_with_a_name_that_is_no_plain_one_is_refused(tmp_path: Path) -> None:
    file = make(tmp_path) / "additional_chat_templates" / ".hidden.jinja"
    file.parent.mkdir()
    file.write_text("r")
    with pytest.raises(CheckpointError, match=r"\.hidden\.jinja: the name of .*got '\.hidden'"):
        read_tokenizer_files(tmp_path, config())


def test_checkpoint_without_chat_template_has_none(tmp_path: Path) -> None:
    files = read_tokenizer_files(make(tmp_path, edit=sets(chat_template=None)), config())
    assert files is not None
    assert files.chat_templates == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": in_decoder(t4100=token("<think>"))}, "'<think>' claims id 4100, but the vocab"),
        (
            {"edit": in_decoder(t5=token("<think>"))},
            "claims id 4093, but the vocabulary gives it 4094",
        ),
        ({"edit": in_decoder(x=token("<think>"))}, "id of an added token must be an integer >= 0"),
        ({"edit": in_decoder(t4096="<think>")}, r"added_tokens_decoder\.4096 must be a string or"),
        (
            {"edit": in_decoder(t4096=token("<a>", odd=1))},
            r"added_tokens_decoder\.4096 has the unknown option 'odd'; content, single_word",
        ),
        (
            {"edit": in_decoder(t4096=token("<a>", lstrip="x"))},
            r"added_tokens_decoder\.4096 is not a token: ",
        ),
        ({"edit": sets(added_tokens_decoder=[])}, "added_tokens_decoder must be an object"),
        ({"edit": sets(eos_token=3)}, "eos_token must be a string or an object with content"),
        ({"edit": sets(additional_special_tokens="x")}, "must be a list or an object, got 'x'"),
        ({"edit": sets(model_max_length="x")}, "model_max_length must be a number >= 1 or null"),
        ({"edit": sets(split_special_tokens=1)}, "split_special_tokens must be true or false"),
        (
            {"edit": sets(chat_template=[{"name": "x"}])},
            "chat_template must be a string or a list",
        ),
        ({"edit_tokenizer": lambda v: v["model"].pop("merges")}, "is not a valid tokenizer: "),
        (
            {"edit_tokenizer": lambda v: v["model"]["merges"].append("q z")},
            "is not a valid tokenizer: ",
        ),
    ],
)
def test_damaged_tokenizer_is_an_error(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make(tmp_path, **options)
    with pytest.raises(CheckpointError, match=message) as e:
        read_tokenizer_files(folder, config())
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [("x", r"line 3839 must be two tokens"), ("qzq zqz", "are not a valid tokenizer: ")],
)
def test_damaged_merges_are_an_error(line: str, message: str, tmp_path: Path) -> None:
    folder = make(tmp_path, vocabulary=True)
    with (folder / "merges.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer_files(folder, config())


@pytest.mark.parametrize(
    ("gone", "kept"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")]
)
def test_half_a_vocabulary_is_an_error(gone: str, kept: str, tmp_path: Path) -> None:
    folder = make(tmp_path, vocabulary=True)
    (folder / gone).unlink()
    with pytest.raises(CheckpointError, match=f"has {kept} but no {gone}"):
        read_tokenizer_files(folder, config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": sets(tokenizer_class="T5Tokenizer")}, "tokenizer_class 'T5Tokenizer' is not"),
        (
            {"edit": sets(tokenizer_class="LlamaTokenizer"), "vocabulary": True},
            r"tokenizer_class 'LlamaTokenizer' without a tokenizer\.json is not supported",
        ),
        (
            {"edit_tokenizer": lambda v: v["model"].update(type="Unigram")},
            "model type 'Unigram' is not supported; a byte-level BPE is",
        ),
    ],
)
def test_tokenizer_of_another_kind_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = make(tmp_path, model_type="qwen3", **options)
    with pytest.raises(UnsupportedModelError, match=message):
        read_tokenizer_files(folder, config("qwen3"))
