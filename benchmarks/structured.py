"""What structured output costs: mask per token, compiling, reading the vocabulary.

    python benchmarks/structured.py

The tokenizer is the embedded model's, padded with made-up words to a vocabulary of 151,936. The
mask is measured over an answer that grows by tokens the grammar allows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from common import report

from qwen_export.bundle import embedded_model
from qwen_runtime.structured import GrammarCompiler, StructuredOutputLogitsProcessor
from qwen_runtime.text import Tokenizer

VOCAB_SIZE = 151_936
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 200},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 20},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def big_tokenizer(path: Path) -> Tokenizer:
    """The embedded tokenizer with made-up words behind its own."""
    raw = json.loads((embedded_model() / "tokenizer.json").read_text("utf-8"))
    vocab: dict[str, int] = raw["model"]["vocab"]
    letters = np.random.default_rng(0).integers(97, 123, (4 * VOCAB_SIZE, 7), dtype=np.uint8)
    taken = {token["id"] for token in raw["added_tokens"]} | set(vocab.values())
    free = (i for i in range(VOCAB_SIZE) if i not in taken)
    for word in dict.fromkeys(row.tobytes().decode() for row in letters):
        number = next(free, None)
        if number is None:
            break
        vocab[word] = number
    path.write_text(json.dumps(raw), "utf-8")
    return Tokenizer(path, {"eos_token": "<|im_end|>"})


def timed(function, *arguments):  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    value = function(*arguments)
    return value, 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = big_tokenizer(Path(scratch, "tokenizer.json"))
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE)
    _, first = timed(compiler.compile, {"type": "choice", "choices": ["a", "b"]})
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    grammar, later = timed(compiler.compile, form)
    _, again = timed(compiler.compile, form)
    eos = tokenizer.token_to_id("<|im_end|>")
    processor = StructuredOutputLogitsProcessor(grammar, prompt_length=0, eos_token_id=[eos])
    source = np.random.default_rng(1)
    ids = np.empty((1, 0), np.int64)
    times = []
    while ids.shape[1] < args.tokens:
        scores = source.standard_normal((1, VOCAB_SIZE)).astype(np.float32)
        masked, milliseconds = timed(processor, ids, scores)
        times.append(milliseconds)
        token = int(masked[0].argmax())
        if token == eos:
            break
        ids = np.append(ids, [[token]], axis=1)
    report(
        {
            "vocabulary": VOCAB_SIZE,
            "tokens": len(times),
            "mask (ms per token and row)": statistics.median(times[1:]),
            "first compile, reads the vocabulary (ms)": first,
            "compile of a new schema (ms)": later,
            "compile of a known schema (ms)": again,
        },
        args.as_json,
    )


if __name__ == "__main__":
    main()
