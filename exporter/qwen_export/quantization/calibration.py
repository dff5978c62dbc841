"""Calibration: what the linear layers are given when the model reads a text, layer by layer.

A layer's Hessians are collected from the outputs of the quantised layers before it, so that GPTQ
also makes good what those changed. Memory holds one layer, its Hessians, and the activations.

Shape letters: R rows of text, T tokens of a row, E hidden_size, K inputs, N outputs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from qwen_export.checkpoint import Checkpoint
from qwen_export.errors import CheckpointError, ExportError
from qwen_export.parity.reference import StreamedReference
from qwen_export.quantization.gptq import ErrorFeedback, error_feedback, gptq
from qwen_export.quantization.options import QuantizationOptions
from qwen_export.quantization.quantizer import check_finite
from qwen_export.quantization.tensor import QuantizedTensor

__all__ = ["CalibratedQuantizer", "read_calibration"]

Floats = npt.NDArray[np.float32]

ROW_TOKENS = 512
ROWS_AT_A_TIME = 8
"""Rows in one forward pass: enough to keep the processor busy with one layer's weights."""

_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
# Linear layers that read the same activations share the Hessian of the first of them.
_LEADERS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def read_calibration(checkpoint: Checkpoint, path: Path) -> npt.NDArray[np.int64]:
    """Encode a text and cut it into rows.

    Args:
        checkpoint: The model; its tokenizer encodes, special tokens in the text included.
        path: A text file in UTF-8.

    Returns:
        Token ids, [R, T], T = 512 or the model's context if that is shorter. What is left over
        at the end is not used.

    Raises:
        CheckpointError: If the checkpoint has no tokenizer.
        ExportError: If the file cannot be read or is too short for one row.
    """
    files = checkpoint.tokenizer_files()
    if files is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer, which calibration needs; use --quantizer search",
            path=checkpoint.path,
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(
            f"the calibration text {path} must be a UTF-8 file that can be read: {error}"
        ) from error
    ids = np.array(Tokenizer.from_str(files.tokenizer_json).encode(text).ids, np.int64)
    length = min(ROW_TOKENS, checkpoint.config.max_position_embeddings)
    rows = len(ids) // length
    if rows == 0:
        raise ExportError(
            f"the calibration text {path} must have at least {length} tokens, got {len(ids)}; "
            "give a longer one, 64 times as long or more for a good result"
        )
    return ids[: rows * length].reshape(rows, length)


class CalibratedQuantizer:
    """A `Quantizer` by GPTQ.

    It remembers the codes of the layer it is at. When the first weight of a later layer comes,
    it runs the layers before that with the weights those codes stand for; a linear layer that
    was not quantised keeps its own.

    Args:
        checkpoint: The model whose weights are to be quantised.
        options: The format.
        token_ids: Calibration rows, [R, T].
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: QuantizationOptions,
        token_ids: npt.NDArray[np.int64],
    ) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._model = _LayerwiseModel(checkpoint)
        self._states = [
            self._model.embed(token_ids[start : start + ROWS_AT_A_TIME])
            for start in range(0, len(token_ids), ROWS_AT_A_TIME)
        ]
        self._layer = _Layer(-1)

    def __call__(self, weight: Floats, *, name: str, start: int = 0) -> QuantizedTensor:
        """Quantise some of a weight's outputs; see `Quantizer`.

        Raises:
            ExportError: Also if the weight is not a linear layer's of the decoder, or is of a
                layer that was left behind.
        """
        options = self._options
        index, linear = self._place(name)
        block_size = options.block_size_of(name, len(weight))
        check_finite(name, weight)
        self._advance(index)
        result = gptq(weight, self._feedback(linear), options.bits, block_size)
        outputs, inputs = self._checkpoint.tensors[name].shape
        kept = self._layer.weights.setdefault(
            linear,
            QuantizedTensor(
                np.zeros((inputs, outputs), np.int8),
                np.zeros((inputs // block_size, outputs), np.float32),
                options.bits,
                block_size,
            ),
        )
        columns = slice(start, start + weight.shape[1])
        kept.codes[:, columns] = result.codes
        kept.scales[:, columns] = result.scales
        return result

    def _place(self, name: str) -> tuple[int, str]:
        """The layer and the linear module that a weight is of."""
        match = _WEIGHT.fullmatch(name)
        if match is None or match[2] not in _LEADERS:
            raise ExportError(
                f"{name} cannot be quantised by gptq, which takes the linear layers of the "
                "decoder only; use --quantizer search for it"
            )
        return int(match[1]), match[2]

    def _advance(self, index: int) -> None:
        """Run the model up to the inputs of a layer, and collect its Hessians."""
        if index < self._layer.index:
            raise ExportError(
                f"gptq takes the layers in order, but layer {index} came after layer "
                f"{self._layer.index}; make a new quantizer"
            )
        while self._layer.index < index:
            if self._layer.index >= 0:
                module = self._model.layer(self._layer.index)
                for linear, quantized in self._layer.weights.items():
                    target = module.get_submodule(linear)
                    target.weight = nn.Parameter(
                        torch.from_numpy(quantized.dequantize().T), requires_grad=False
                    )
                self._states = [
                    self._model.run(module, self._layer.index, state) for state in self._states
                ]
            self._layer = _Layer(self._layer.index + 1)
        if not self._layer.hessians and self._layer.feedback is None:
            self._collect()

    def _collect(self) -> None:
        """Sum X^T X over the calibration rows for every set of inputs of the current layer."""
        module = self._model.layer(self._layer.index)
        hessians = self._layer.hessians
        for linear in sorted(set(_LEADERS.values())):
            target = module.get_submodule(linear)
            assert isinstance(target, nn.Linear)
            hessians[linear] = torch.zeros(target.in_features, target.in_features)
            target.register_forward_pre_hook(partial(_add_inputs, hessians[linear]))
        for state in self._states:
            self._model.run(module, self._layer.index, state)

    def _feedback(self, linear: str) -> ErrorFeedback:
        """The error feedback of a linear module; kept for the slices that follow."""
        leader = _LEADERS[linear]
        if self._layer.feedback is None or self._layer.feedback[0] != leader:
            self._layer.feedback = (leader, error_feedback(self._layer.hessians[leader].numpy()))
        return self._layer.feedback[1]


@dataclass(slots=True)
class _Layer:
    """What is known of the layer that is being quantised."""

    index: int
    """-1 before the first."""
    hessians: dict[str, Tensor] = field(default_factory=dict)
    """Sum of X^T X, [K, K] fp32, by the first linear module that reads X."""
    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    """What was quantised, by linear module; columns that were not given are zero."""
    feedback: tuple[str, ErrorFeedback] | None = None
    """The last one made, with the key of its Hessian."""


class _LayerwiseModel(StreamedReference):
    """The reference's layers, one by one, over rows without padding."""

    @torch.no_grad()
    def embed(self, token_ids: npt.NDArray[np.int64]) -> Tensor:
        """Hidden states [R, T, E] before the first layer."""
        return self._embed(token_ids)

    def layer(self, index: int) -> nn.Module:
        """A decoder layer with its weights in fp32."""
        return self._module(
            partial(self._classes.layer, self._config, index), f"model.layers.{index}."
        )

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, state: Tensor) -> Tensor:
        """Hidden states [R, T, E] after a layer."""
        rows, length = state.shape[:2]
        masks = self.masks(torch.ones(rows, length, dtype=torch.bool))
        output: Tensor = layer(
            state,
            attention_mask=masks[self._config.layer_types[index]],
            position_ids=torch.arange(length).expand(rows, -1),
            position_embeddings=self.rotary("exact", length),
        )
        return output


@torch.no_grad()
def _add_inputs(hessian: Tensor, _: nn.Module, inputs: Sequence[Tensor]) -> None:
    """A forward hook: add X^T X of a linear module's inputs to its Hessian."""
    x = inputs[0].flatten(0, -2)
    hessian.addmm_(x.T, x)
