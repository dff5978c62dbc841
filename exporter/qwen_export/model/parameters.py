"""Which tensors the graphs want, in the order the weights file holds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen_export.checkpoint import ModelConfig
from qwen_export.model.decoder import Decoder, Linear

__all__ = ["Parameter", "parameters"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor of the graphs."""

    name: str
    """Its name in the checkpoint, or of a rotary table."""
    shape: tuple[int, ...]
    """Its shape in the graphs."""
    transposed: bool
    """Whether the checkpoint has it the other way round: a linear layer's weight, [out, in]."""


def parameters(config: ModelConfig, *, tied: bool, max_context: int) -> list[Parameter]:
    """List the decoder's parameters without allocating them."""
    with torch.device("meta"):
        decoder = Decoder(config, tied=tied, max_context=max_context)
    linear = {
        f"{name}.weight" for name, module in decoder.named_modules() if isinstance(module, Linear)
    }
    return [
        Parameter(name, tuple(value.shape), name in linear)
        for name, value in decoder.named_parameters()
    ]
