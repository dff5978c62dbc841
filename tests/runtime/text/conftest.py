"""The golden tokenizer (289 tokens, byte-level BPE in Qwen's layout) and its recorded cases."""

import json
from pathlib import Path

import pytest

from qwen_runtime.text import Tokenizer

REPOSITORY = Path(__file__).parents[3]
GOLDEN = REPOSITORY / "tests" / "data" / "golden"
SPECIAL_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.fixture(scope="session")
def special_tokens():
    return dict(SPECIAL_TOKENS)


@pytest.fixture(scope="session")
def golden_dir():
    return GOLDEN


@pytest.fixture(scope="session")
def golden():
    return json.loads((GOLDEN / "text.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(GOLDEN / "tokenizer" / "tokenizer.json", SPECIAL_TOKENS)


@pytest.fixture(scope="session")
def chat_model_tokenizer():
    folder = REPOSITORY / "exporter" / "qwen_export" / "data" / "tiny-qwen2-chat"
    return Tokenizer(folder / "tokenizer.json", SPECIAL_TOKENS)


@pytest.fixture(scope="session")
def reference_tokenizer():
    """Transformers' own tokenizer over the same files."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
