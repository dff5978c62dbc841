"""Bytes on disk: of the weights by the code that writes them, of the rest as measured."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.planning.source import Source
from qwen_export.weights import (
    ALIGNMENT,
    PAGE,
    PAGE_ALIGN_FROM,
    QuantizedSource,
    TensorSource,
    scale_name,
)
from qwen_export.weights import Source as WeightSource
from qwen_runtime.backends.sessions import MIN_CACHED_BYTES

__all__ = [
    "DiskSize",
    "StoredBytes",
    "disk_size",
    "packed_cache_bytes",
    "parameter_counts",
    "stored_bytes",
]

# Graphs name every node, so their size follows from the number of layers: both phases of the
# Qwen2.5-0.5B shape are 62 kB at 2 layers and 320 kB at 12, of Qwen3-0.6B 111 kB at 4.
_GRAPHS_BASE, _GRAPHS_PER_LAYER = 11_000, 25_700
# Added by DequantizeLinear nodes and scales, for each quantised weight and both phases.
_GRAPHS_PER_QUANTIZED = 630
# Graph and description of lowered/cpu: 75 kB at 4 layers of the Qwen2.5-0.5B shape, 406 kB at 24.
_LOWERED_BASE, _LOWERED_PER_LAYER = 9_200, 16_550
# 6,050 bytes at 2 layers, 21,830 at 12.
_MANIFEST_BASE, _MANIFEST_PER_LAYER = 3_000, 1_580
_REPORT = 120_000
"""parity.json, parity.html and reference.npz: 106 to 130 kB for models from 4 to 900 MB."""

_PARTS = (
    ("embedding", re.compile(re.escape(EMBEDDING_NAME))),
    ("lm_head", re.compile(re.escape(LM_HEAD_NAME))),
    ("attention", re.compile(r".*\.self_attn\..*")),
    ("mlp", re.compile(r".*\.mlp\..*")),
    ("norms", re.compile(r".*norm\.weight")),
)


@dataclass(frozen=True, slots=True)
class StoredBytes:
    """A tensor of weights.bin."""

    name: str
    num_bytes: int
    is_scale: bool = False
    bits: int = 32
    """Of an element."""


@dataclass(frozen=True, slots=True)
class DiskSize:
    """Bytes of a bundle."""

    weights: int
    """weights.bin, its padding included."""
    graphs: int
    """prefill.onnx and decode.onnx, and lowered/cpu where there is one, within some kilobytes."""
    text: int
    """tokenizer.json, chat templates and generation_config.json."""
    reports: int
    """manifest.json and what proves parity, within some kilobytes."""

    @property
    def total(self) -> int:
        """Everything."""
        return self.weights + self.graphs + self.text + self.reports


def parameter_counts(source: Source) -> dict[str, int]:
    """Parameters by the part of the model they belong to.

    Those of a model that cannot be built are the values in its weights files, whatever they are.
    """
    if source.checkpoint is None:
        sizes = [(tensor.name, tensor.num_values) for tensor in source.stored]
    else:
        tensors = source.checkpoint.tensors
        sizes = [(name, math.prod(tensor.shape)) for name, tensor in tensors.items()]
    counts = dict.fromkeys([name for name, _ in _PARTS] + ["other"], 0)
    for name, size in sizes:
        part = next((part for part, shape in _PARTS if shape.fullmatch(name)), "other")
        counts[part] += size
    return {name: count for name, count in counts.items() if count}


def stored_bytes(sources: Sequence[WeightSource]) -> list[StoredBytes]:
    """The tensors that `write_weights` makes of the sources, in their order."""
    return [entry for source in sources for entry in _entries(source)]


def _entries(source: WeightSource) -> Iterator[StoredBytes]:
    if isinstance(source, TensorSource):
        yield StoredBytes(source.name, source.num_bytes)
        return
    scales = 4 * (source.shape[0] // source.format.block_size) * source.shape[1]
    yield StoredBytes(source.name, source.num_bytes - scales, bits=source.format.bits)
    yield StoredBytes(scale_name(source.name), scales, is_scale=True)


def disk_size(
    source: Source,
    sources: Sequence[WeightSource],
    *,
    num_layers: int,
    lowered: bool,
    verified: bool = True,
) -> DiskSize:
    """Bytes of the bundle that a build makes.

    Args:
        source: Gives tokenizer and generation settings.
        sources: What goes into weights.bin.
        num_layers: Layers of the model.
        lowered: Whether the bundle has a graph for the CPU.
        verified: Whether the bundle has the files that prove parity.
    """
    position = 0
    for entry in stored_bytes(sources):
        position += -position % (PAGE if entry.num_bytes >= PAGE_ALIGN_FROM else ALIGNMENT)
        position += entry.num_bytes
    quantized = sum(isinstance(entry, QuantizedSource) for entry in sources)
    graphs = _GRAPHS_BASE + _GRAPHS_PER_LAYER * num_layers + _GRAPHS_PER_QUANTIZED * quantized
    return DiskSize(
        weights=position,
        graphs=graphs + (_LOWERED_BASE + _LOWERED_PER_LAYER * num_layers) * lowered,
        text=_text_bytes(source),
        reports=_MANIFEST_BASE + _MANIFEST_PER_LAYER * num_layers + _REPORT * verified,
    )


def packed_cache_bytes(
    stored: Sequence[StoredBytes], weights: int, *, tied: bool, lowered: bool
) -> int:
    """Bytes of the packed weights that the first run on a CPU leaves in the user's cache folder.

    ONNX Runtime saves quantised weights as its operator takes them and packed, their scales with
    the packed form and their blocks' sums too. Portable graphs embed by a form of a tied table of
    their own. Measured to 1 % at int8 and int4.

    Args:
        stored: The tensors of weights.bin.
        weights: Bytes of weights.bin.
        tied: Whether the output projection embeds too.
        lowered: Whether the bundle has a graph for the CPU.

    Returns:
        0 for floats and for small weights, which are packed in memory.
    """
    if weights < MIN_CACHED_BYTES or all(entry.bits == 32 for entry in stored):
        return 0
    total = 0
    for entry in stored:
        embeds = entry.name in (EMBEDDING_NAME, scale_name(EMBEDDING_NAME))
        multiplied = entry.is_scale or entry.bits != 32
        if not multiplied or (embeds and not tied):
            total += entry.num_bytes
        else:
            once_more = embeds and not lowered
            total += ((3 if entry.is_scale else 2) + once_more) * entry.num_bytes
    return total


def _text_bytes(source: Source) -> int:
    generation = source.checkpoint.generation_config if source.checkpoint else {}
    texts = [json.dumps(generation, indent=2, ensure_ascii=False) + "\n"]
    if source.tokenizer is not None:
        texts += [source.tokenizer.tokenizer_json, *source.tokenizer.chat_templates.values()]
    return sum(len(text.encode()) for text in texts)
