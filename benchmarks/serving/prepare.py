"""Give the random model of `benchmarks/peers` a text side, so that servers can answer with it.

    python benchmarks/serving/prepare.py --peers /tmp/peers-work/layers-all --work /tmp/serving-work \
        --peers-python benchmarks/peers/.venv/bin/python

Writes `int8`, a bundle of the same weights, and `q8_0.gguf`, the same tensors. Both get one
byte-level vocabulary: the bytes, then made-up words of four to five letters, so that each token is
text that a server has to send, of the length that tokens have in English. No token ends an answer;
all have the length that is asked for. What is there already is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["main", "vocabulary"]

_HERE = Path(__file__).parent


def vocabulary(size: int) -> list[str]:
    """Tokens by id, in the byte-level spelling: 256 bytes, then words that begin with a space."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    words = ("Ġ" + word for word in _words())
    # The first word can be merged from two bytes: tokenizers want one merge at least.
    return [spelling[byte] for byte in range(256)] + [
        "Ġa",
        *itertools.islice(words, size - 257),
    ]


def _words() -> Iterator[str]:
    for length in (4, 5):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="has checkpoint and q8_0.gguf")
    parser.add_argument("--work", type=Path, required=True, help="folder to write to")
    parser.add_argument("--peers-python", type=Path, help="with gguf; without it no GGUF is made")
    args = parser.parse_args()
    checkpoint = args.work / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    _write_checkpoint(args.peers / "checkpoint", checkpoint)
    bundle, gguf = args.work / "int8", args.work / "q8_0.gguf"
    if not bundle.exists():
        tool = Path(sys.executable).with_name("qwen-export")
        options = ["--precision", "int8", "--quantizer", "rtn", "--no-verify"]
        subprocess.run([tool, "build", checkpoint, "--output", bundle, *options], check=True)
    if args.peers_python is not None and not gguf.exists():
        script = _HERE / "gguf_vocabulary.py"
        files = [args.peers / "q8_0.gguf", checkpoint / "tokenizer.json", gguf]
        subprocess.run([args.peers_python, script, *files], check=True)


def _write_checkpoint(source: Path, output: Path) -> None:
    weights = output / "model.safetensors"
    if not weights.exists():
        weights.symlink_to((source / "model.safetensors").resolve())
    config = json.loads((source / "config.json").read_text("utf-8"))
    config = {name: value for name, value in config.items() if not name.endswith("_token_id")}
    tokens = vocabulary(config["vocab_size"])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [["Ġ", "a"]],
        },
    }
    documents = {
        "config.json": config,
        "generation_config.json": {"do_sample": False},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }
    for name, document in documents.items():
        (output / name).write_text(json.dumps(document, ensure_ascii=False), "utf-8")


if __name__ == "__main__":
    main()
