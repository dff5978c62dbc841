"""The embedded model's tokenizer, a compiler over it, and what a grammar says of a text."""

import json

import numpy as np
import pytest

from qwen_export.bundle import embedded_model
from qwen_runtime.structured import GrammarCompiler
from qwen_runtime.text import Tokenizer

VOCAB_SIZE = 4096


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(embedded_model() / "tokenizer.json", {"eos_token": "<|im_end|>"})


@pytest.fixture(scope="session")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB_SIZE)


@pytest.fixture(scope="session")
def compile_schema(compiler):
    def compiled(schema):
        return compiler.compile({"type": "json_schema", "json_schema": {"schema": schema}})

    return compiled


@pytest.fixture(scope="session")
def accepts(tokenizer):
    """Whether a text is a whole answer of a grammar."""

    def accepted(grammar, text):
        matcher = grammar.matcher()
        ids = tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return accepted


@pytest.fixture(scope="session")
def allowed(tokenizer):
    """Texts of the tokens that a processor leaves after some text."""

    def left(processor, text=""):
        ids = np.array([tokenizer.encode(text)], np.int64).reshape(1, -1)
        scores = processor(ids, np.zeros((1, VOCAB_SIZE), np.float32))
        return {tokenizer.decode([int(i)]) for i in np.flatnonzero(scores[0] > -np.inf)}

    return left


@pytest.fixture(scope="session")
def dumps():
    return lambda value: json.dumps(value, ensure_ascii=False)
