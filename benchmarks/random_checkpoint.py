"""Write a random checkpoint of a published Qwen shape, for measuring without the real weights.

    python benchmarks/random_checkpoint.py Qwen2.5-0.5B /tmp/qwen --seed 0 --layers 12

The same arguments write the same bytes. Memory stays bounded whatever the size: values come from
one pool of normal numbers, copied from random places, so no two rows are the same but none is
drawn anew. There is no tokenizer in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qwen_export.checkpoint import ModelConfig, expected_tensors

__all__ = ["DTYPES", "SHAPES", "Shape", "config_dict", "main", "write_checkpoint"]

DTYPES: dict[str, tuple[str, str, np.dtype[Any]]] = {
    "bf16": ("bfloat16", "BF16", np.dtype(ml_dtypes.bfloat16)),
    "fp16": ("float16", "F16", np.dtype(np.float16)),
    "fp32": ("float32", "F32", np.dtype(np.float32)),
}
"""Name in config.json, name in safetensors and NumPy type, by the name of the option."""

_SHARD_BYTES = 5_000_000_000  # as the published checkpoints are cut
_POOL = (1 << 23) + 9  # numbers in the pool
_CHUNK = 1 << 20  # numbers copied from one place of it
_STD = 0.02  # initializer_range of every Qwen config


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one published model."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    vocab: int = 151936
    positions: int = 32768
    head_dim: int = 128
    eps: float = 1e-6


def _qwen2(sizes: tuple[int, int, int, int, int], *, tied: bool = False, **more: Any) -> Shape:
    hidden, _, _, heads, _ = sizes
    return Shape("qwen2", *sizes, tied, head_dim=hidden // heads, **more)


def _qwen3(sizes: tuple[int, int, int, int, int], *, tied: bool = False) -> Shape:
    return Shape("qwen3", *sizes, tied, positions=40960)


_LONG: dict[str, Any] = {"positions": 131072}
_WIDE: dict[str, Any] = {"vocab": 152064, **_LONG}
_05B, _15B, _7B = (896, 4864, 24, 14, 2), (1536, 8960, 28, 12, 2), (3584, 18944, 28, 28, 4)
_72B = (8192, 29568, 80, 64, 8)

# hidden, intermediate, layers, heads, KV heads: from the config.json of each model on the hub.
SHAPES: dict[str, Shape] = {
    "Qwen2-0.5B": _qwen2(_05B, tied=True, **_LONG),
    "Qwen2-1.5B": _qwen2(_15B, tied=True, **_LONG),
    "Qwen2-7B": _qwen2(_7B, **_WIDE),
    "Qwen2-72B": _qwen2(_72B, eps=1e-5, **_WIDE),
    "Qwen2.5-0.5B": _qwen2(_05B, tied=True),
    "Qwen2.5-1.5B": _qwen2(_15B, tied=True, **_LONG),
    "Qwen2.5-3B": _qwen2((2048, 11008, 36, 16, 2), tied=True),
    "Qwen2.5-7B": _qwen2(_7B, **_WIDE),
    "Qwen2.5-14B": _qwen2((5120, 13824, 48, 40, 8), eps=1e-5, **_WIDE),
    "Qwen2.5-32B": _qwen2((5120, 27648, 64, 40, 8), eps=1e-5, **_WIDE),
    "Qwen2.5-72B": _qwen2(_72B, eps=1e-5, **_WIDE),
    "Qwen3-0.6B": _qwen3((1024, 3072, 28, 16, 8), tied=True),
    "Qwen3-1.7B": _qwen3((2048, 6144, 28, 16, 8), tied=True),
    "Qwen3-4B": _qwen3((2560, 9728, 36, 32, 8), tied=True),
    "Qwen3-8B": _qwen3((4096, 12288, 36, 32, 8)),
    "Qwen3-14B": _qwen3((5120, 17408, 40, 40, 8)),
    "Qwen3-32B": _qwen3((5120, 25600, 64, 64, 8)),
}
"""Sizes by published name; the Instruct and Chat models have those of their base."""


def config_dict(name: str, *, dtype: str = "bf16", layers: int | None = None) -> dict[str, Any]:
    """Make the config.json of a shape.

    Args:
        name: A name in SHAPES.
        dtype: A name in DTYPES.
        layers: Number of layers; None is the published one.

    Returns:
        The config, in the spelling of transformers 4 that the published files use.
    """
    shape = SHAPES[name]
    num_layers = shape.layers if layers is None else layers
    config: dict[str, Any] = {
        "architectures": [f"Q{shape.model_type[1:]}ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": _STD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
        "max_window_layers": num_layers,
        "model_type": shape.model_type,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.eps,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": DTYPES[dtype][0],
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }
    if shape.model_type == "qwen3":
        config.update(attention_bias=False, head_dim=shape.head_dim)
    return config


def write_checkpoint(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "bf16",
    layers: int | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> int:
    """Write a random checkpoint.

    Linear weights, embeddings and biases are normal with standard deviation 0.02; norm weights lie
    around 1.

    Args:
        name: A name in SHAPES.
        folder: Where to write; made if missing, must be empty.
        seed: Of the random numbers, >= 0.
        dtype: A name in DTYPES.
        layers: Number of layers; None is the published one.
        shard_bytes: Weights beyond this size are cut into several files, each at most this large
            unless one tensor is larger.

    Returns:
        Bytes of weights written.

    Raises:
        FileExistsError: If the folder holds something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} must be empty")
    raw = config_dict(name, dtype=dtype, layers=layers)
    _write_json(folder / "config.json", raw)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "pad_token_id": 151643,
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        },
    )
    tensors = expected_tensors(ModelConfig.from_dict(raw, folder / "config.json"))
    _, stored, numpy_type = DTYPES[dtype]
    sizes = {
        tensor: int(np.prod(shape)) * numpy_type.itemsize for tensor, shape in tensors.items()
    }
    shards = _cut(sizes, shard_bytes)
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(_POOL, np.float32) * np.float32(_STD)).astype(numpy_type)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(names, file))
        with (folder / file).open("wb") as out:
            _write_header(
                out, {tensor: (stored, tensors[tensor], sizes[tensor]) for tensor in names}
            )
            for tensor in names:
                for block in _values(tensor, int(np.prod(tensors[tensor])), rng, pool):
                    out.write(block.view(np.uint8).data)
    total = sum(sizes.values())
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    return total


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a Qwen shape.")
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("folder", type=Path, metavar="OUT", help="an empty or new folder")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--layers", type=int, metavar="N", help="default: as published")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed must be >= 0, got {options.seed}")
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers must be >= 1, got {options.layers}")
    start = time.perf_counter()
    try:
        written = write_checkpoint(
            options.shape,
            options.folder,
            seed=options.seed,
            dtype=options.dtype,
            layers=options.layers,
        )
    except OSError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(
        f"{options.folder}: {written / 1e6:.0f} MB in {seconds:.1f} s "
        f"({written / 1e6 / seconds:.0f} MB/s)"
    )
    return 0


def _cut(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_header(out: BinaryIO, tensors: dict[str, tuple[str, tuple[int, ...], int]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (stored, shape, size) in tensors.items():
        header[name] = {
            "dtype": stored,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    out.write(len(text).to_bytes(8, "little"))
    out.write(text)


def _values(
    name: str, count: int, rng: np.random.Generator, pool: np.ndarray[Any, Any]
) -> Iterator[np.ndarray[Any, Any]]:
    if name.endswith("norm.weight"):
        spread = rng.standard_normal(count, np.float32) * np.float32(0.1)
        yield (1 + spread).astype(pool.dtype)
        return
    while count:
        size = min(count, _CHUNK)
        start = int(rng.integers(len(pool) - size + 1))
        yield pool[start : start + size]
        count -= size


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
