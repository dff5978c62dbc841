"""Memory of a bundle at run time on the CPU, and of an engine on a GPU.

Sizes of weights and KV caches follow from the layout and are exact. What the libraries add was
measured (`python benchmarks/plan.py`), on Linux with the versions named in docs/performance.md.

Shape letters: S new tokens of a call, C capacity, H query heads, E hidden_size, F
intermediate_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_export.checkpoint import ModelConfig
from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.planning.sizes import StoredBytes
from qwen_export.weights import scale_name
from qwen_runtime.backends.onnxruntime import PREFILL_CHUNK
from qwen_runtime.cache import rounded_capacity
from qwen_runtime.engine.prefix import KEPT_SLOTS

__all__ = [
    "COMPUTE_BYTES",
    "Layout",
    "RunMemory",
    "is_lowered",
    "kv_bytes",
    "run_memory",
]

COMPUTE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes of an activation or a cached value."""
_ROTARY = "model.rotary_emb."

_RUN_PROCESS = 84_000_000
"""Python with NumPy, ONNX Runtime, its session and this package, after loading. With it
`RunMemory.total` is within 1 % of the resident memory of the Qwen2.5-0.5B shape (24 layers) in int8
and int4 at 256 and 1,024 tokens."""
_GROUP_QUERY_UNIT = 8
"""What GroupQueryAttention wants a head_dim to be a multiple of (`qwen_export.lowering.attention`)."""
_HEAP_LIMIT = 32 << 20
"""Bytes from which glibc gives every freed buffer back to the system. Packing a tensor to compare
it with the saved form raises its limit up to this; without a packed cache buffers are larger than
what was freed before them, and go back."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What of weights.bin plays which part at run time, in bytes."""

    linears: int
    """Linear layers, biases and norms: read in every step, with their scales."""
    embedding: int
    """An embedding table that is nothing else: a step reads one row of it."""
    head: int
    """The output projection; a tied table is this."""
    rotary: int
    """Rotary tables."""
    scales: int
    """Scales of linears and output projection, which those include."""
    tied: bool
    """Whether the output projection embeds too."""

    @classmethod
    def of(cls, stored: Sequence[StoredBytes], *, tied: bool, compute_bytes: int = 4) -> Layout:
        """Sort the tensors of weights.bin; floats (scales too) count as ``compute_bytes`` each."""
        engine = compute_bytes != COMPUTE_BYTES["fp32"]
        parts = {"linears": 0, "embedding": 0, "head": 0, "rotary": 0, "scales": 0}
        for entry in stored:
            num_bytes = (
                entry.num_bytes * compute_bytes // 4 if entry.bits == 32 else entry.num_bytes
            )
            part = _part(entry.name, tied=tied)
            parts[part] += num_bytes
            if engine and part == "head" and tied and entry.bits == 4:
                # TensorRT's order of int4 for a MatMul is not the one for lookups.
                parts[part] += num_bytes
            if entry.is_scale and part != "embedding":
                parts["scales"] += num_bytes
        return cls(**parts, tied=tied)

    @property
    def total(self) -> int:
        """All of it."""
        return self.linears + self.embedding + self.head + self.rotary

    @property
    def streamed(self) -> int:
        """What a decode step reads whole."""
        return self.linears + self.head


def _part(name: str, *, tied: bool) -> str:
    if name in (EMBEDDING_NAME, scale_name(EMBEDDING_NAME)):
        return "head" if tied else "embedding"
    if name in (LM_HEAD_NAME, scale_name(LM_HEAD_NAME)):
        return "head"
    return "rotary" if name.startswith(_ROTARY) else "linears"


@dataclass(frozen=True, slots=True)
class RunMemory:
    """Memory for one batch of rows, in bytes."""

    device: Literal["cpu", "gpu"]
    compute_dtype: str
    context: int
    """Tokens a row has at the end."""
    batch: int
    """Rows that run at the same time."""
    weights: int
    """Copies of weights that belong to the process: ONNX Runtime's packed ones, or an engine's."""
    mapped: int
    """Weights mapped from weights.bin, or from the packed cache; the system may drop such pages
    when memory is short, and read them again."""
    kv_cache: int
    """Caches of the rows at the capacity that this context needs."""
    kept_prompts: int
    """Caches of prompts that are kept for others that begin like them, if as long as the rows: what
    `LLM` keeps by default, and nothing with ``prefix_cache_slots=0``."""
    activations: int
    """Of a prefill call of `PREFILL_CHUNK` tokens, the largest there is, and the logits."""
    outgrown: int
    """Caches that were replaced by larger ones as prompts were kept, and that the C library holds
    for the process after packed weights were mapped: 20, 40 and 79 MB for the 0.5B shape at 256,
    512 and 1,024 tokens."""
    process: int
    """Python and its libraries; on a GPU the driver's context is not counted, see the notes."""

    @property
    def total(self) -> int:
        """Resident memory once as many prompts have come as are kept."""
        caches = self.kv_cache + self.kept_prompts
        used = self.weights + self.mapped + caches + self.activations
        return used + self.outgrown + self.process


def is_lowered(config: ModelConfig, *, quantized: bool) -> bool:
    """Whether a build gives a bundle a graph for the CPU.

    Args:
        config: Gives head_dim.
        quantized: Whether its weights are int8 or int4.
    """
    return quantized and config.head_dim % _GROUP_QUERY_UNIT == 0


def kv_bytes(
    config: ModelConfig, *, context: int, batch: int, limit: int, compute_bytes: int = 4
) -> int:
    """Bytes of the KV caches of ``batch`` rows that grow to ``context`` tokens.

    Args:
        config: Gives layers, heads and head_dim.
        context: Tokens of a row.
        batch: Rows.
        limit: The bundle's limit, where capacities end.
        compute_bytes: Of a cached value.
    """
    capacity = min(rounded_capacity(context), limit)
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return row * capacity * batch * compute_bytes


def run_memory(
    config: ModelConfig,
    layout: Layout,
    *,
    context: int,
    batch: int,
    limit: int,
    compute_dtype: str = "fp32",
    packed_cache: bool = False,
    lowered: bool = False,
) -> RunMemory:
    """Memory at run time: on the CPU for fp32 compute, of an engine on a GPU otherwise.

    Args:
        config: Gives the sizes of caches and activations.
        layout: The weights, with floats of the compute type.
        context: Tokens of a row.
        batch: Rows.
        limit: The bundle's limit, where capacities end.
        compute_dtype: Of activations and caches.
        packed_cache: Whether the CPU maps its packed weights from the user's cache folder.
        lowered: Whether the CPU runs a graph of its own instead of the portable one.
    """
    num_bytes = COMPUTE_BYTES[compute_dtype]
    on_gpu = compute_dtype != "fp32"
    # Beside the packed codes are their scales again, and the sums of their blocks.
    packed = layout.linears + layout.head + 2 * layout.scales
    # The session looks tokens up in the table as stored, beside the packed copy of it.
    mapped = layout.head if layout.tied and not on_gpu else 0
    if on_gpu:
        weights = layout.total
    elif packed_cache:
        weights, mapped = 0, mapped + packed
    else:
        weights = packed
    row = kv_bytes(config, context=context, batch=1, limit=limit, compute_bytes=num_bytes)
    kept = max(0, KEPT_SLOTS - batch) * row
    # Of keys or of values of one layer: buffers are replaced one by one, slot after slot.
    largest = (batch * row + kept) // (2 * config.num_hidden_layers)
    return RunMemory(
        device="gpu" if on_gpu else "cpu",
        compute_dtype=compute_dtype,
        context=context,
        batch=batch,
        weights=weights,
        mapped=mapped,
        kv_cache=batch * row,
        kept_prompts=kept,
        activations=_activations(
            config, context, batch, limit, num_bytes, on_gpu=on_gpu, lowered=lowered
        ),
        outgrown=kept if packed_cache and not on_gpu and largest < _HEAP_LIMIT else 0,
        process=0 if on_gpu else _RUN_PROCESS,
    )


def _activations(
    config: ModelConfig,
    context: int,
    batch: int,
    limit: int,
    num_bytes: int,
    *,
    on_gpu: bool,
    lowered: bool,
) -> int:
    tokens = min(context, PREFILL_CHUNK)
    capacity = min(rounded_capacity(context), limit)
    # gate, up, their product and one in flight; hidden states, residual, queries and output.
    widest = 4 * config.intermediate_size + 4 * config.hidden_size
    call, logits = tokens * widest * num_bytes, batch * config.vocab_size * 4
    if on_gpu:
        return call + logits
    if lowered:
        # ONNX Runtime's arena keeps the buffers of the first call and the block that it plans for
        # the next ones: 43 MB, then 90 and no more, for the 0.5B shape at any capacity.
        return 2 * call + logits
    # The portable Attention holds the scores of all heads at once, before and after softmax; fused
    # ones take them a tile at a time.
    return call + logits + 2 * config.num_attention_heads * tokens * capacity * num_bytes
