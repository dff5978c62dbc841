"""Copy a GGUF file and give it the vocabulary of a tokenizer.json; runs in the peers' environment.

python gguf_vocabulary.py IN.gguf tokenizer.json OUT.gguf
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf

__all__ = ["copy_with_vocabulary"]


def copy_with_vocabulary(source: Path, tokenizer: Path, output: Path) -> None:
    """Write a copy with a byte-level tokenizer in place of whatever it had.

    Args:
        source: The GGUF file.
        tokenizer: A tokenizer.json of a BPE model with as many tokens as the file's vocabulary.
        output: Where to write.
    """
    model = json.loads(tokenizer.read_text("utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(output, architecture)
    for field in reader.fields.values():
        written_anyway = field.name.startswith("GGUF.") or field.name == "general.architecture"
        if written_anyway or field.name.startswith("tokenizer."):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    # llama.cpp would take token 11 for the end of text.
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_add_bos_token(False)
    for tensor in reader.tensors:
        data = tensor.data
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    copy_with_vocabulary(*map(Path, sys.argv[1:]))
