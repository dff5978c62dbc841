"""The reference: transformers' own layers in fp32, one at a time, weights streamed.

A layer is built without storage, given its weights from the checkpoint, run over all rows, and
dropped. Memory stays near one layer and the activations of the rows, whatever the model's depth.

Shape letters: B rows, T tokens of the longest row, E hidden_size, V vocab_size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from qwen_export.checkpoint import Checkpoint
from qwen_export.parity.original import CheckpointWeights, ReferenceWeights
from qwen_runtime.backends.base import FloatArray, IntArray

__all__ = ["ReferenceBatch", "Rope", "StreamedReference"]

Rope = Literal["exact", "wrong theta", "swapped halves"]
"""How rows are rotated: as the config says, or wrong on purpose, for negative controls."""

WRONG_THETA_FACTOR = 10.0
TABLE_BLOCK_BYTES = 64 << 20
"""Of the output table in fp32, converted and multiplied at a time."""


@dataclass(frozen=True, slots=True)
class ReferenceBatch:
    """Rows that run together, padded on the left to one length as transformers pads them."""

    rows: tuple[IntArray, ...]
    """Token ids, [T_i] each."""
    positions: tuple[IntArray, ...]
    """Positions of each row whose hidden states are wanted, counted from its first token."""
    rope: Rope = "exact"
    widened: int = 0
    """Tokens by which sliding windows are too wide, for a negative control."""


@dataclass(frozen=True, slots=True)
class _Classes:
    layer: Callable[[Any, int], nn.Module]
    norm: Callable[..., nn.Module]
    rotary: Callable[[Any], nn.Module]


_CLASSES = {
    "qwen2": _Classes(
        modeling_qwen2.Qwen2DecoderLayer,
        modeling_qwen2.Qwen2RMSNorm,
        modeling_qwen2.Qwen2RotaryEmbedding,
    ),
    "qwen3": _Classes(
        modeling_qwen3.Qwen3DecoderLayer,
        modeling_qwen3.Qwen3RMSNorm,
        modeling_qwen3.Qwen3RotaryEmbedding,
    ),
}


_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


class StreamedReference:
    """A model as transformers runs it in fp32 with eager attention.

    The config is read by transformers, not by our reader, so that a misread key shows.

    Args:
        weights: An opened checkpoint, or what a bundle made of its weights.
    """

    def __init__(
        self, weights: Checkpoint | ReferenceWeights, dtype: torch.dtype = torch.float32
    ) -> None:
        self._dtype = dtype
        if isinstance(weights, Checkpoint):
            weights = CheckpointWeights(weights)
        self._weights = weights
        self._classes = _CLASSES[weights.config.model_type]
        self._config = AutoConfig.from_pretrained(
            weights.path, attn_implementation="eager", local_files_only=True
        )

    @property
    def num_layers(self) -> int:
        """Layers that `hidden_states` goes through."""
        return int(self._config.num_hidden_layers)

    @property
    def vocab_size(self) -> int:
        """Tokens that `logits` gives a number each."""
        return int(self._config.vocab_size)

    def rotary(self, rope: Rope, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions 0..length-1, [1, length, head_dim] each."""
        config = self._config
        if rope == "wrong theta":
            config = copy.deepcopy(config)
            config.rope_parameters["rope_theta"] *= WRONG_THETA_FACTOR
        cos, sin = self._classes.rotary(config)(torch.zeros(1), torch.arange(length)[None])
        # Rotating by the negative angle is what pairing the halves the other way round does.
        cos, sin = cos.to(self._dtype), sin.to(self._dtype)
        return (cos, -sin) if rope == "swapped halves" else (cos, sin)

    @property
    def sliding_window(self) -> int | None:
        """Tokens a sliding layer sees; None where no layer slides."""
        slides = "sliding_attention" in self._config.layer_types
        return int(self._config.sliding_window) if slides else None

    def masks(self, real: Tensor, widened: int = 0) -> dict[str, Tensor]:
        """What is added to attention scores, by layer type, [B, 1, T, T] each.

        Args:
            real: False where a row is padded, [B, T] bool.
            widened: Tokens to add to the sliding window.
        """
        config = self._config
        if widened:
            config = copy.deepcopy(config)
            config.sliding_window += widened
        return {
            kind: _MASKS[kind](
                config=config,
                inputs_embeds=torch.zeros(*real.shape, 1, dtype=self._dtype),
                attention_mask=real,
                past_key_values=None,
            )
            for kind in set(config.layer_types)
        }

    @torch.no_grad()
    def hidden_states(
        self,
        batches: Sequence[ReferenceBatch],
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[list[Tensor]]:
        """Run all rows through the model once.

        Args:
            batches: Rows, teacher-forced: every token is given.
            progress: Called with 1 after every layer.

        Returns:
            Hidden states after the final norm, of each row of each batch, [positions_i, E].
        """
        inputs = [_Inputs.of(batch, self) for batch in batches]
        states = [self._embed(item.token_ids) for item in inputs]
        for index in range(self.num_layers):
            layer = self._module(
                partial(self._classes.layer, self._config, index), f"model.layers.{index}."
            )
            for i, item in enumerate(inputs):
                states[i] = layer(
                    states[i],
                    attention_mask=item.masks[self._config.layer_types[index]],
                    position_ids=item.position_ids,
                    position_embeddings=item.rotary,
                )
            del layer
            progress(1)
        norm = self._module(
            partial(self._classes.norm, self._config.hidden_size, eps=self._config.rms_norm_eps),
            "model.norm.",
        )
        return [
            [
                norm(state[row, state.shape[1] - len(ids) + torch.from_numpy(wanted)])
                for row, (ids, wanted) in enumerate(zip(batch.rows, batch.positions, strict=True))
            ]
            for batch, state in zip(batches, states, strict=True)
        ]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> FloatArray:
        """Project hidden states [n, E] onto the vocabulary, [n, V] float32.

        The table is read in blocks of rows; callers bound n.
        """
        name = self._weights.tying.lm_head
        vocab_size = int(self._config.vocab_size)
        rows = max(1, TABLE_BLOCK_BYTES // (4 * hidden.shape[1]))
        logits = np.empty((len(hidden), vocab_size), np.float32)
        for start in range(0, vocab_size, rows):
            block = _float32(self._weights.rows(name, slice(start, start + rows)))
            part = nn.functional.linear(hidden, block.to(self._dtype))
            logits[:, start : start + rows] = part.float().numpy()
            self._weights.release(name)
        return logits

    def _embed(self, token_ids: IntArray) -> Tensor:
        name = self._weights.tying.embedding
        rows = _float32(self._weights.rows(name, token_ids.ravel()))
        self._weights.release(name)
        return rows.to(self._dtype).view(*token_ids.shape, -1)

    def _module(self, make: Callable[[], nn.Module], prefix: str) -> nn.Module:
        """A module of transformers with its weights; every one must be there, and no other."""
        with torch.device("meta"):
            module = make()
        state = {}
        for name in self._weights.names:
            if name.startswith(prefix):
                state[name.removeprefix(prefix)] = _float32(self._weights.read(name)).to(
                    self._dtype
                )
                self._weights.release(name)
        module.load_state_dict(state, strict=True, assign=True)
        return module.eval()


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the layers of one batch are given, as transformers' model class prepares it."""

    token_ids: IntArray
    """[B, T]; 0 where padded."""
    position_ids: Tensor
    """[B, T]; 0 where padded."""
    masks: dict[str, Tensor]
    """Added to attention scores, by layer type, [B, 1, T, T]: 0, or the lowest number."""
    rotary: tuple[Tensor, Tensor]
    """Cosine and sine, [B, T, head_dim]."""

    @classmethod
    def of(cls, batch: ReferenceBatch, reference: StreamedReference) -> _Inputs:
        length = max(len(row) for row in batch.rows)
        pads = torch.tensor([length - len(row) for row in batch.rows])
        token_ids = np.zeros((len(batch.rows), length), np.int64)
        for padded, row in zip(token_ids, batch.rows, strict=True):
            padded[length - len(row) :] = row
        columns = torch.arange(length)
        real = columns[None, :] >= pads[:, None]
        position_ids = (columns[None] - pads[:, None]).clamp(min=0)
        cos, sin = reference.rotary(batch.rope, length)
        return cls(
            token_ids,
            position_ids,
            reference.masks(real, batch.widened),
            (cos[0][position_ids], sin[0][position_ids]),
        )


def _float32(array: npt.NDArray[Any]) -> Tensor:
    """A tensor of a checkpoint as fp32, always a copy."""
    if array.dtype.name == "bfloat16":
        bits = array.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return torch.from_numpy(bits.view(np.float32))
    return torch.from_numpy(np.array(array, np.float32))
