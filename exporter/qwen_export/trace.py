"""From a model configuration to an ONNX graph, without weights.

The decoder is built and traced under PyTorch's fake tensors: shapes and types exist, storage does
not, so tracing a 72B model costs as much memory as tracing a small one.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from qwen_export import passes
from qwen_export.checkpoint import ModelConfig
from qwen_export.model import ops
from qwen_export.model.decoder import Decoder

__all__ = ["Phase", "input_names", "output_names", "trace"]

Phase = Literal["prefill", "decode"]
# Warning filters and logger levels belong to the process.
_ONE_AT_A_TIME = threading.Lock()


def input_names(phase: Phase, num_layers: int) -> list[str]:
    """Names of a graph's inputs, in order."""
    heads = ["input_ids", "past_lengths"] + (["logits_indices"] if phase == "prefill" else [])
    return heads + [f"past_key_values.{i}.{part}" for i in range(num_layers) for part in _PARTS]


def output_names(num_layers: int) -> list[str]:
    """Names of a graph's outputs, in order."""
    return ["logits"] + [f"present.{i}.{part}" for i in range(num_layers) for part in _PARTS]


def trace(config: ModelConfig, phase: Phase, *, tied: bool, max_context: int) -> ir.Model:
    """Trace one phase of the decoder; threads take turns.

    Args:
        config: A supported configuration.
        phase: "prefill" takes any number of new tokens per row; "decode" takes exactly one.
        tied: Whether logits come from the embedding table.
        max_context: Rows of the rotary tables, in tokens.

    Returns:
        A cleaned graph whose initializers have names, types and shapes, and data only where they
        are small constants of the graph itself. Names of the others are the decoder's parameter
        names.
    """
    with _ONE_AT_A_TIME, FakeTensorMode(), torch.no_grad(), _quiet():
        decoder = Decoder(config, tied=tied, max_context=max_context).eval()
        args, dynamic_shapes = _example(config, phase)
        exported = torch.export.export(decoder, args, dynamic_shapes=dynamic_shapes, strict=False)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=ops.OPSET,
            optimize=False,
            verbose=False,
            custom_translation_table=ops.ONNX_TRANSLATIONS,
            input_names=input_names(phase, config.num_hidden_layers),
            output_names=output_names(config.num_hidden_layers),
        )
        if program is None:
            raise AssertionError("torch.onnx.export returned no program")
    return passes.clean(program.model)


_PARTS = ("key", "value")


def _example(config: ModelConfig, phase: Phase) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example arguments and which of their axes are dynamic; sizes differ so that none merge."""
    batch, sequence, capacity, num_logits = 2, 7 if phase == "prefill" else 1, 13, 3
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    past = torch.zeros(batch, dtype=torch.int64)
    indices = torch.zeros(batch, num_logits, dtype=torch.int64) if phase == "prefill" else None
    buffer = (batch, config.num_key_value_heads, capacity, config.head_dim)
    cache = [(torch.zeros(buffer), torch.zeros(buffer)) for _ in range(config.num_hidden_layers)]
    b, s, c, n = Dim("batch"), Dim("sequence"), Dim("capacity"), Dim("num_logits")
    shapes = (
        {0: b, 1: s} if phase == "prefill" else {0: b},
        {0: b},
        {0: b, 1: n} if phase == "prefill" else None,
        [({0: b, 2: c}, {0: b, 2: c})] * config.num_hidden_layers,
    )
    return (ids, past, indices, cache), shapes


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch's notes about its own internals (missing torchvision, pytree) off stderr."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
