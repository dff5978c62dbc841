"""The decoder's operators: one PyTorch body, one ONNX form each.

Every operator below is a `torch.library.custom_op` with a real eager body, so that the traced
module runs (and is tested) in PyTorch, and an ONNX translation that names the standard operator
it stands for. ``ONNX_TRANSLATIONS`` is what `torch.onnx.export` receives.

Shape letters: B batch, S new tokens, C cache capacity, H query heads, K key/value heads,
D head_dim, E hidden_size, N positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnxscript.values import Op, Opset

__all__ = [
    "DOMAIN",
    "ONNX_TRANSLATIONS",
    "OPSET",
    "cached_attention",
    "causal_mask",
    "gather_positions",
    "merge_heads",
    "positions",
    "rms_norm",
    "rotary_embedding",
    "split_heads",
    "tensor_scatter",
    "tied_lm_head",
]

DOMAIN = "qwen"
OPSET = 24

Tensor = torch.Tensor
_onnx: Any = Opset("", OPSET)


def _cached_attention_op() -> Any:
    """The call of the model-local function ``qwen::CachedAttention``."""
    value = onnx.defs.OpSchema.FormalParameter
    schema = onnx.defs.OpSchema(
        "CachedAttention",
        DOMAIN,
        1,
        inputs=[
            *(value(name, "T") for name in ("q", "k", "v")),
            value("mask", "tensor(bool)"),
            value("kv_lengths", "tensor(int64)"),
        ],
        outputs=[value("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
    )
    return Op(Opset(DOMAIN, 1), "CachedAttention", schema)


_CachedAttention: Any = _cached_attention_op()


def _ints(*values: int) -> Any:
    return _onnx.Constant(value_ints=list(values))


def _range(stop: Any) -> Any:
    """0, 1, ... stop - 1 as int64; ``stop`` is a tensor of one element."""
    zero, one = _onnx.Constant(value_int=0), _onnx.Constant(value_int=1)
    return _onnx.Range(zero, _onnx.Squeeze(stop), one)


@torch.library.custom_op("qwen::positions", mutates_args=())
def positions(input_ids: Tensor, past_lengths: Tensor) -> Tensor:
    """Position of every new token, [B, S] int64: past_lengths[b] + 0, 1, ... S - 1."""
    return past_lengths[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)


@positions.register_fake
def _(input_ids: Tensor, past_lengths: Tensor) -> Tensor:
    return input_ids.new_empty(input_ids.shape, dtype=torch.int64)


def _positions_onnx(input_ids: Any, past_lengths: Any) -> Any:
    first = _onnx.Unsqueeze(past_lengths, _ints(1))
    if input_ids.shape[1] == 1:
        return first
    return _onnx.Add(first, _range(_onnx.Shape(input_ids, start=1, end=2)))


@torch.library.custom_op("qwen::causal_mask", mutates_args=())
def causal_mask(position_ids: Tensor, cache: Tensor, window: int | None = None) -> Tensor:
    """Which cache slots a new token may attend to, [B, 1, S, C] bool.

    Slots up to its own position; with a window only the last ``window`` of them, its own included.
    """
    columns = torch.arange(cache.shape[2], device=cache.device)
    rows = position_ids[:, None, :, None]
    visible = columns <= rows
    return visible if window is None else visible & (columns > rows - window)


@causal_mask.register_fake
def _(position_ids: Tensor, cache: Tensor, window: int | None = None) -> Tensor:
    batch, sequence = position_ids.shape
    return position_ids.new_empty((batch, 1, sequence, cache.shape[2]), dtype=torch.bool)


def _causal_mask_onnx(position_ids: Any, cache: Any, window: int | None = None) -> Any:
    # Columns, rows and the comparison are the same nodes for every mask of a graph, and shared.
    columns = _range(_onnx.Shape(cache, start=2, end=3))
    rows = _onnx.Unsqueeze(position_ids, _ints(1, 3))
    visible = _onnx.LessOrEqual(columns, rows)
    if window is None:
        return visible
    first_hidden = _onnx.Sub(rows, _onnx.Constant(value_int=window))
    return _onnx.And(visible, _onnx.Greater(columns, first_hidden))


@torch.library.custom_op("qwen::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis; mean and rsqrt in fp32, as in transformers."""
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _rms_norm_onnx(x: Any, weight: Any, eps: float) -> Any:
    return _onnx.RMSNormalization(x, weight, axis=-1, epsilon=eps)


@torch.library.custom_op("qwen::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Rotate heads by their positions.

    Args:
        x: Heads before rotation, [B, H, S, D]; D even.
        cos: Cosine of every angle, [max_context, D/2].
        sin: Sine of every angle, [max_context, D/2].
        position_ids: Row of the tables for every token, [B, S] int64.

    Returns:
        The rotated heads, [B, H, S, D].

    Source:
        RoFormer, arXiv:2104.09864. The halves are paired (i, i + D/2) as in Hugging Face's
        ``rotate_half``, not interleaved (2i, 2i + 1).
    """
    c, s = cos[position_ids][:, None], sin[position_ids][:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    return torch.empty_like(x)


def _rotary_embedding_onnx(x: Any, cos: Any, sin: Any, position_ids: Any) -> Any:
    return _onnx.RotaryEmbedding(x, cos, sin, position_ids)


@torch.library.custom_op("qwen::tensor_scatter", mutates_args=())
def tensor_scatter(cache: Tensor, update: Tensor, past_lengths: Tensor) -> Tensor:
    """Write ``update`` [B, K, S, D] into ``cache`` [B, K, C, D] from past_lengths[b] on."""
    rows = past_lengths[:, None] + torch.arange(update.shape[2], device=update.device)
    index = rows[:, None, :, None].expand_as(update)
    return cache.scatter(2, index, update)


@tensor_scatter.register_fake
def _(cache: Tensor, update: Tensor, past_lengths: Tensor) -> Tensor:
    return torch.empty_like(cache)


def _tensor_scatter_onnx(cache: Any, update: Any, past_lengths: Any) -> Any:
    return _onnx.TensorScatter(cache, update, past_lengths, axis=-2, mode="linear")


@torch.library.custom_op("qwen::cached_attention", mutates_args=())
def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kv_lengths: Tensor) -> Tensor:
    """Attention of new tokens over the cache.

    Args:
        q: Rotated queries, [B, H, S, D].
        k: Key cache with the new keys in it, [B, K, C, D]; K divides H.
        v: Value cache likewise, [B, K, C, D].
        mask: Slots a token may attend to, [B, 1, S, C] bool.
        kv_lengths: Slots in use in each row, [B] int64. The mask says as much; an engine whose
            kernel takes lengths can use them instead.

    Returns:
        [B, H, S, D].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@cached_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kv_lengths: Tensor) -> Tensor:
    return torch.empty_like(q)


def _cached_attention_onnx(q: Any, k: Any, v: Any, mask: Any, kv_lengths: Any) -> Any:
    return _CachedAttention(q, k, v, mask, kv_lengths)


@torch.library.custom_op("qwen::split_heads", mutates_args=())
def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H*D] -> [B, H, S, D]."""
    batch, sequence, width = x.shape
    heads = x.view(batch, sequence, width // head_dim, head_dim).transpose(1, 2)
    # Of one token this is contiguous already, and an operator must not return a view of its input.
    return heads.clone(memory_format=torch.contiguous_format)


@split_heads.register_fake
def _(x: Tensor, head_dim: int) -> Tensor:
    batch, sequence, width = x.shape
    return x.new_empty((batch, width // head_dim, sequence, head_dim))


def _split_heads_onnx(x: Any, head_dim: int) -> Any:
    heads = x.shape[2] // head_dim
    if x.shape[1] == 1:
        return _onnx.Reshape(x, _ints(0, heads, 1, head_dim))
    return _onnx.Transpose(_onnx.Reshape(x, _ints(0, 0, heads, head_dim)), perm=[0, 2, 1, 3])


@torch.library.custom_op("qwen::merge_heads", mutates_args=())
def merge_heads(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H*D]."""
    return x.transpose(1, 2).flatten(2).clone()


@merge_heads.register_fake
def _(x: Tensor) -> Tensor:
    batch, heads, sequence, head_dim = x.shape
    return x.new_empty((batch, sequence, heads * head_dim))


def _merge_heads_onnx(x: Any) -> Any:
    width = x.shape[1] * x.shape[3]
    if x.shape[2] == 1:
        return _onnx.Reshape(x, _ints(0, 1, width))
    return _onnx.Reshape(_onnx.Transpose(x, perm=[0, 2, 1, 3]), _ints(0, 0, width))


@torch.library.custom_op("qwen::gather_positions", mutates_args=())
def gather_positions(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``x`` [B, S, E] at ``indices`` [B, N]: [B, N, E]."""
    return x.gather(1, indices[:, :, None].expand(-1, -1, x.shape[2]))


@gather_positions.register_fake
def _(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty((*indices.shape, x.shape[2]))


def _gather_positions_onnx(x: Any, indices: Any) -> Any:
    return _onnx.GatherND(x, _onnx.Unsqueeze(indices, _ints(2)), batch_dims=1)


@torch.library.custom_op("qwen::tied_lm_head", mutates_args=())
def tied_lm_head(x: Tensor, table: Tensor) -> Tensor:
    """Logits [B, N, V] of ``x`` [B, N, E] against the embedding table [V, E]."""
    return F.linear(x, table)


@tied_lm_head.register_fake
def _(x: Tensor, table: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], table.shape[0]))


def _tied_lm_head_onnx(x: Any, table: Any) -> Any:
    # Gemm reads the table as it is stored. Transpose + MatMul would be folded into a second,
    # transposed copy of the largest tensor when a session loads.
    vocab, width = table.shape
    rows = _onnx.Reshape(x, _ints(-1, width))
    logits = _onnx.Gemm(rows, table, transB=1)
    if x.shape[1] == 1:
        return _onnx.Reshape(logits, _ints(-1, 1, vocab))
    return _onnx.Reshape(
        logits, _onnx.Concat(_onnx.Shape(x, start=0, end=2), _ints(vocab), axis=0)
    )


_ops = torch.ops.qwen
ONNX_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _ops.positions.default: _positions_onnx,
    _ops.causal_mask.default: _causal_mask_onnx,
    _ops.rms_norm.default: _rms_norm_onnx,
    _ops.rotary_embedding.default: _rotary_embedding_onnx,
    _ops.tensor_scatter.default: _tensor_scatter_onnx,
    _ops.cached_attention.default: _cached_attention_onnx,
    _ops.split_heads.default: _split_heads_onnx,
    _ops.merge_heads.default: _merge_heads_onnx,
    _ops.gather_positions.default: _gather_positions_onnx,
    _ops.tied_lm_head.default: _tied_lm_head_onnx,
}
