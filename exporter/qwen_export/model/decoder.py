"""The decoder that is traced: Qwen2 and Qwen3, dense, over a caller-owned KV cache.

Attribute paths are the checkpoint's tensor names, so ``named_parameters()`` lists what must be
in the checkpoint. The one difference: a linear layer's weight is [in, out] here (``x @ W``, what
ONNX's MatMul takes) and [out, in] in a checkpoint.

Shape letters as in `qwen_export.model.ops`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_export.checkpoint import ModelConfig
from qwen_export.model import ops

__all__ = ["Decoder", "KVCache", "Linear"]

KVCache = list[tuple[Tensor, Tensor]]
"""Per layer: key and value buffers, each [B, K, C, D]."""


class Linear(nn.Module):
    """``x @ weight + bias`` with weight [in, out]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        y: Tensor = ops.rms_norm(x, self.weight, self.eps)
        return y


class Embedding(nn.Module):
    """Rows of a [V, E] table."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, S] int64 -> [B, S, E]."""
        y: Tensor = F.embedding(input_ids, self.weight)
        return y


class TiedHead(nn.Module):
    """Logits from the embedding table, which a checkpoint then stores once."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """[B, N, E] and [V, E] -> [B, N, V]."""
        y: Tensor = ops.tied_lm_head(x, table)
        return y


class RotaryTables(nn.Module):
    """Cosines and sines of every position, [max_context, D/2] each."""

    def __init__(self, max_context: int, head_dim: int) -> None:
        super().__init__()
        self.cos = nn.Parameter(torch.empty(max_context, head_dim // 2))
        self.sin = nn.Parameter(torch.empty(max_context, head_dim // 2))


class Attention(nn.Module):
    """Grouped-query attention that writes its keys and values into the cache.

    ::

        x - q_proj - split - [q_norm] - RotaryEmbedding ------------------+
          - k_proj - split - [k_norm] - RotaryEmbedding - TensorScatter - CachedAttention - o_proj
          - v_proj - split ------------------------------ TensorScatter --+
    """

    def __init__(self, config: ModelConfig, layer_type: str) -> None:
        super().__init__()
        self.layer_type = layer_type
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=config.output_bias)
        norm = config.qk_norm
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if norm else None

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor], step: Step
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, S, E] -> [B, S, E] and the updated key and value cache."""
        q = ops.split_heads(self.q_proj(x), self.head_dim)
        k = ops.split_heads(self.k_proj(x), self.head_dim)
        v = ops.split_heads(self.v_proj(x), self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = ops.rotary_embedding(q, step.tables.cos, step.tables.sin, step.position_ids)
        k = ops.rotary_embedding(k, step.tables.cos, step.tables.sin, step.position_ids)
        keys = ops.tensor_scatter(cache[0], k, step.past_lengths)
        values = ops.tensor_scatter(cache[1], v, step.past_lengths)
        y = ops.cached_attention(q, keys, values, step.masks[self.layer_type], step.kv_lengths)
        return self.o_proj(ops.merge_heads(y)), (keys, values)


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        gate = self.gate_proj(x)
        y: Tensor = self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """One pre-norm transformer layer; its type, "full_attention" or another, chooses its mask."""

    def __init__(self, config: ModelConfig, layer_type: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_type)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cache: tuple[Tensor, Tensor], step: Step
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, S, E] -> [B, S, E] and the updated key and value cache."""
        y, cache = self.self_attn(self.input_layernorm(x), cache, step)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Model(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: ModelConfig, max_context: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = RotaryTables(max_context, config.head_dim)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        slides = "sliding_attention" in config.layer_types
        self.window = config.sliding_window if slides else None

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, cache: KVCache
    ) -> tuple[Tensor, KVCache]:
        """[B, S] int64 -> hidden states [B, S, E] before the final norm, and the new cache."""
        step = Step(input_ids, past_lengths, cache, self.rotary_emb, self.window)
        x = self.embed_tokens(input_ids)
        present: KVCache = []
        for layer, past in zip(self.layers, cache, strict=True):
            x, updated = layer(x, past, step)
            present.append(updated)
        return x, present


class Step:
    """What every layer of one call shares: positions, masks, lengths, rotary tables."""

    def __init__(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        cache: KVCache,
        tables: RotaryTables,
        window: int | None = None,
    ) -> None:
        self.tables = tables
        self.past_lengths = past_lengths
        self.position_ids = ops.positions(input_ids, past_lengths)
        self.masks = {"full_attention": ops.causal_mask(self.position_ids, cache[0][0])}
        if window is not None:
            self.masks["sliding_attention"] = ops.causal_mask(
                self.position_ids, cache[0][0], window
            )
        self.kv_lengths = past_lengths + input_ids.shape[1]


class Decoder(nn.Module):
    """The whole decoder: new tokens and a cache in, logits and the cache out.

    Args:
        config: Dimensions and switches; see `qwen_export.checkpoint.ModelConfig`.
        tied: Whether logits come from the embedding table instead of ``lm_head.weight``.
        max_context: Rows of the rotary tables: the longest row a bundle can hold, in tokens.
    """

    def __init__(self, config: ModelConfig, *, tied: bool, max_context: int) -> None:
        super().__init__()
        self.model = Model(config, max_context)
        self.lm_head = (
            TiedHead() if tied else Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def forward(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        logits_indices: Tensor | None,
        cache: KVCache,
    ) -> tuple[Tensor, KVCache]:
        """Run new tokens.

        Args:
            input_ids: [B, S] int64, right-padded rows.
            past_lengths: Tokens already in each row's cache, [B] int64.
            logits_indices: Positions in 0..S-1 whose logits are wanted, [B, N] int64; None for
                every position.
            cache: Key and value buffers of every layer, [B, K, C, D].

        Returns:
            Logits [B, N, V] float32 and the updated cache.
        """
        x, present = self.model(input_ids, past_lengths, cache)
        if logits_indices is not None:
            x = ops.gather_positions(x, logits_indices)
        x = self.model.norm(x)
        if isinstance(self.lm_head, TiedHead):
            return self.lm_head(x, self.model.embed_tokens.weight), present
        return self.lm_head(x), present
