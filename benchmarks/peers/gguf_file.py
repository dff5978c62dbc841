"""Write a Qwen2 checkpoint as GGUF and let llama.cpp quantise it; runs in the peers' environment.

    python gguf_file.py write CHECKPOINT OUT.gguf
    python gguf_file.py quantize IN.gguf OUT.gguf Q8_0|Q4_0

Matrices stay bf16 as in the checkpoint, norms and biases become fp32 as llama.cpp wants them. The
file has no tokenizer ("none", which llama.cpp takes): token ids go in. Quantising prints how many
tensors became which type, and the type of the token table.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

__all__ = ["main", "quantize", "tensor_types", "write"]

_ARCH = gguf.MODEL_ARCH.QWEN2
_FTYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


def write(checkpoint: Path, output: Path) -> None:
    """Write a bf16 checkpoint of the qwen2 architecture, in one file, as GGUF.

    Raises:
        ValueError: If the checkpoint is of another architecture or type.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "qwen2":
        raise ValueError(f"model_type must be qwen2, got {config['model_type']}")
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[_ARCH])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(_ARCH, config["num_hidden_layers"])
    for name, values in _tensors(checkpoint / "model.safetensors"):
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise ValueError(f"{name}: the qwen2 architecture of GGUF has no such tensor")
        if values.ndim == 1:
            writer.add_tensor(new_name, (values.astype(np.uint32) << 16).view(np.float32))
        else:
            as_bytes = values.view(np.uint8)
            writer.add_tensor(new_name, as_bytes, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, output: Path, ftype: str, threads: int) -> None:
    """Quantise a GGUF file with llama.cpp's own mix of types.

    Raises:
        RuntimeError: If llama.cpp could not.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = _FTYPES[ftype]
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(output).encode(), ctypes.byref(params)
    )
    if status:
        raise RuntimeError(f"{source}: llama.cpp could not quantise to {ftype}, status {status}")


def tensor_types(path: Path) -> dict[str, object]:
    """How many tensors have which type, and the type of the table used for tokens and output."""
    tensors = gguf.GGUFReader(path).tensors
    types = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    output = types.get("output.weight", types["token_embd.weight"])
    return {"types": dict(Counter(types.values())), "output": output}


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.uint16]]]]:
    """Name and bits of every tensor of a bf16 safetensors file, mapped."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name}: the checkpoint must be bf16, got {entry['dtype']}")
        begin, end = entry["data_offsets"]
        yield name, np.asarray(data[begin:end]).view(np.uint16).reshape(entry["shape"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("write")
    verb.add_argument("checkpoint", type=Path)
    verb.add_argument("output", type=Path)
    verb = verbs.add_parser("quantize")
    verb.add_argument("source", type=Path)
    verb.add_argument("output", type=Path)
    verb.add_argument("ftype", choices=_FTYPES)
    verb.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.verb == "write":
        write(args.checkpoint, args.output)
    else:
        quantize(args.source, args.output, args.ftype, args.threads)
    print(json.dumps(tensor_types(args.output)))


if __name__ == "__main__":
    main()
