"""Small quantised checkpoints, packed from the published layouts and unpacked again by loops.

Nothing here uses the exporter's own readers. K inputs, N outputs, G groups.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]
Pack = Callable[[str, tuple[int, int], np.random.Generator], tuple[dict[str, Array], Array]]

GOLDEN = Path(__file__).parents[1] / "data/golden/models"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
}
LINEAR = re.compile(r".*_proj\.weight")


def write_checkpoint(
    folder: Path,
    pack: Pack,
    quantization: dict[str, Any],
    *,
    model: str = "qwen2_untied",
    which: re.Pattern[str] = LINEAR,
) -> dict[str, Array]:
    """A golden checkpoint with some weights packed; gives the weights that they stand for."""
    shutil.copytree(GOLDEN / model, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": quantization}))
    rng = np.random.default_rng(7)
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name, value in list(tensors.items()):
        if which.fullmatch(name):
            del tensors[name]
            parts, expected[name] = pack(name.removesuffix(".weight"), value.shape, rng)
            tensors.update(parts)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return expected


def change_tensors(folder: Path, change: Callable[[dict[str, Array]], None]) -> None:
    """Edit the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    # The library's own loader knows no float8.
    tensors = {}
    for name, entry in deserialize(file.read_bytes()):
        data = np.frombuffer(entry["data"], TYPES[entry["dtype"]])
        tensors[name] = data.reshape(entry["shape"]).copy()
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def words(codes: list[int], bits: int) -> list[int]:
    """Codes as signed 32-bit words, the first in the lowest bits; the last word may be part full."""
    per_word = 32 // bits
    packed = []
    for start in range(0, len(codes), per_word):
        word = sum(code << (bits * i) for i, code in enumerate(codes[start : start + per_word]))
        packed.append(word - (1 << 32) if word >= 1 << 31 else word)
    return packed


def field(word: int, i: int, bits: int) -> int:
    return (int(word) % (1 << 32) >> (bits * i)) % (1 << bits)


def product(scale: Any, number: int) -> np.float32:
    return np.float32(scale) * np.float32(number)


def each(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for n in range(shape[0]):
        for k in range(shape[1]):
            yield n, k


def draw_scales(rng: np.random.Generator, *shape: int) -> Array:
    return rng.uniform(0.001, 0.02, shape).astype(np.float16)


def draw_zeros(rng: np.random.Generator, shape: tuple[int, int], bits: int, *, sym: bool) -> Array:
    """From 1 on, which version 1 of GPTQ can store too."""
    if sym:
        return np.full(shape, 1 << (bits - 1))
    return rng.integers(1, 1 << bits, shape)


def gptq(
    bits: int, group: int, *, sym: bool = True, version: int = 1, scale_type: Any = np.float16
) -> Pack:
    def pack(
        module: str, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[dict[str, Array], Array]:
        num_outputs, num_inputs = shape
        size = num_inputs if group == -1 else group
        groups, per_word, added = num_inputs // size, 32 // bits, 2 - version
        codes = rng.integers(0, 1 << bits, (num_inputs, num_outputs))
        zeros = draw_zeros(rng, (groups, num_outputs), bits, sym=sym)
        parts = {
            "qweight": np.array([words(list(column), bits) for column in codes.T], np.int32).T,
            "qzeros": np.array([words(list(row - added), bits) for row in zeros], np.int32),
            "scales": draw_scales(rng, groups, num_outputs).astype(scale_type),
            "g_idx": np.array([k // size for k in range(num_inputs)], np.int32),
        }
        weight = np.empty(shape, np.float32)
        for n, k in each(shape):
            code = field(parts["qweight"][k // per_word, n], k % per_word, bits)
            g = k // size
            zero = field(parts["qzeros"][g, n // per_word], n % per_word, bits) + added
            weight[n, k] = product(parts["scales"][g, n], code - zero)
        return _named(module, parts), weight

    return pack


def awq(group: int, *, sym: bool = False) -> Pack:
    def interleaved(rows: Array) -> Array:
        runs = rows.reshape(len(rows), -1, 8)[:, :, AWQ_ORDER].reshape(rows.shape)
        return np.array([words(list(row), 4) for row in runs], np.int32)

    def pack(
        module: str, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[dict[str, Array], Array]:
        num_outputs, num_inputs = shape
        size = num_inputs if group == -1 else group
        groups = num_inputs // size
        codes = rng.integers(0, 16, (num_inputs, num_outputs))
        zeros = draw_zeros(rng, (groups, num_outputs), 4, sym=sym)
        parts = {
            "qweight": interleaved(codes),
            "qzeros": interleaved(zeros),
            "scales": draw_scales(rng, groups, num_outputs),
        }
        weight = np.empty(shape, np.float32)
        for n, k in each(shape):
            i = AWQ_ORDER.index(n % 8)
            code = field(parts["qweight"][k, n // 8], i, 4)
            zero = field(parts["qzeros"][k // size, n // 8], i, 4)
            weight[n, k] = product(parts["scales"][k // size, n], code - zero)
        return _named(module, parts), weight

    return pack


def compressed_packed(
    bits: int, group: int | None, *, sym: bool = True, scale_type: Any = np.float16
) -> Pack:
    """compressed-tensors "pack-quantized"; a group of None is one scale for each output."""

    def pack(
        module: str, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[dict[str, Array], Array]:
        num_outputs, num_inputs = shape
        size = group or num_inputs
        groups, per_word, middle = num_inputs // size, 32 // bits, 1 << (bits - 1)
        codes = rng.integers(-middle, middle, shape)
        zeros = rng.integers(-middle, middle, (num_outputs, groups))
        parts = {
            "weight_packed": np.array(
                [words(list(row + middle), bits) for row in codes], np.int32
            ),
            "weight_shape": np.array(shape, np.int64),
            "weight_scale": draw_scales(rng, num_outputs, groups).astype(scale_type),
        }
        if not sym:
            columns = [words(list(column + middle), bits) for column in zeros.T]
            parts["weight_zero_point"] = np.array(columns, np.int32).T
        weight = np.empty(shape, np.float32)
        for n, k in each(shape):
            number = field(parts["weight_packed"][n, k // per_word], k % per_word, bits) - middle
            if not sym:
                word = parts["weight_zero_point"][n // per_word, k // size]
                number -= field(word, n % per_word, bits) - middle
            weight[n, k] = product(parts["weight_scale"][n, k // size], number)
        return _named(module, parts), weight

    return pack


def compressed_bytes(
    group: int | None, *, sym: bool = True, low: int = -128, high: int = 127
) -> Pack:
    """compressed-tensors "int-quantized"; a group of None is one scale for each output, 0 one."""

    def pack(
        module: str, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[dict[str, Array], Array]:
        size = group or shape[1]
        grid = (1,) if group == 0 else (shape[0], shape[1] // size)
        parts = {
            "weight": rng.integers(low, high + 1, shape).astype(np.int8),
            "weight_scale": draw_scales(rng, *grid),
        }
        if not sym:
            parts["weight_zero_point"] = rng.integers(-9, 10, grid).astype(np.int8)
        weight = np.empty(shape, np.float32)
        for n, k in each(shape):
            at = (0,) if group == 0 else (n, k // size)
            number = int(parts["weight"][n, k])
            if not sym:
                number -= int(parts["weight_zero_point"][at])
            weight[n, k] = product(parts["weight_scale"][at], number)
        return _named(module, parts), weight

    return pack


def float8(block: tuple[int, int] | None, scale_name: str, *, scale_shape: str = "grid") -> Pack:
    """e4m3 weights; a block of None is one scale for all, (1, 0) one for each output."""

    def pack(
        module: str, shape: tuple[int, int], rng: np.random.Generator
    ) -> tuple[dict[str, Array], Array]:
        rows = block[0] if block else shape[0]
        columns = block[1] if block and block[1] else shape[1]
        grid = (-(-shape[0] // rows), -(-shape[1] // columns))
        scales = rng.uniform(0.001, 0.01, grid).astype(ml_dtypes.bfloat16)
        codes = rng.normal(0, 100, shape).astype(ml_dtypes.float8_e4m3fn)
        weight = np.empty(shape, np.float32)
        for n, k in each(shape):
            value = float8_value(int(codes[n, k].view(np.uint8)))
            weight[n, k] = product(scales[n // rows, k // columns], value)
        stored = {"grid": grid, "row": grid[:1], "one": (1,), "scalar": ()}[scale_shape]
        parts = {"weight": codes, scale_name: scales.reshape(stored)}
        return _named(module, parts), weight

    return pack


def float8_value(byte: int) -> Any:
    """An e4m3 number from its bits: 1 sign, 4 exponent (bias 7), 3 mantissa."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


def _named(module: str, parts: dict[str, Array]) -> dict[str, Array]:
    return {f"{module}.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
