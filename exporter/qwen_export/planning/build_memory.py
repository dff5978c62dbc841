"""Memory of a build: while it writes weights, calibrates and verifies.

Sizes of what is held follow from the shapes. What the libraries add was measured
(`python benchmarks/plan.py`), on Linux with the versions named in docs/performance.md.

Shape letters: R rows of text, T tokens of a row, H query heads, E hidden_size, F
intermediate_size, K inputs of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qwen_export.checkpoint import ModelConfig
from qwen_export.errors import OptionError
from qwen_export.planning.memory import Layout, kv_bytes
from qwen_export.planning.source import Source
from qwen_export.weights import BLOCK_BYTES, MAX_PASSES, QuantizedSource, TensorSource
from qwen_export.weights import Source as WeightSource

__all__ = ["build_peak", "calibration_bytes", "verify_peak"]

_ROTARY = "model.rotary_emb."

_BUILD_PROCESS = 410_000_000
"""Python with torch, onnx and NumPy after a trace."""
_BUILD_PER_LAYER = 2_950_000
"""Of both graphs while they are traced: 828 MB at 2 layers, 858 MB at 12."""
_BUILD_SLICES = 3
"""Blocks that are alive while a weight is quantised: 782 MB for the 0.5B shape (2 layers) at int8."""
_CALIBRATION_PROCESS = 300_000_000
"""transformers, and torch's buffers: 1,488 MB for the 0.5B shape (2 layers)."""
_HELD = 3
"""Arrays of the same kind that are alive at once."""
_VERIFY_TOKENS = 8_000
_VERIFY_HELD = {
    "fp32": (1_150_000_000, 0.82, 3.05),
    "int8": (670_000_000, 2.2, 0.41),
    "int4": (1_150_000_000, 0.43, 0.05),
}
"""By precision: libraries and activations, and how often the bytes that tables and linears have in
fp32 are held, packed, mapped and read. Fitted to verified builds, with cached tokens, all within 8 %:

- Qwen2.5-0.5B, 2 and 8 layers: fp32 1,975 and 3,132 MB, int8 1,929 and 2,124, int4 1,508 and 1,573;
- Qwen3-0.6B, 2 layers: fp32 2,300, int8 2,164, int4 1,460; 4 and 8 layers: fp32 2,816 and 4,041;
- Qwen2.5-1.5B, 3 layers: fp32 3,674, int8 3,094, int4 1,660."""


def build_peak(
    source: Source, sources: Sequence[WeightSource], *, num_layers: int, calibration: int = 0
) -> int:
    """Peak resident memory of a build with ``--no-verify``, in bytes.

    A tensor at a time is mapped from the checkpoint and converted block by block; a quantised one
    keeps its codes until all are there. Measured to 2 % for fp32 on shapes of 0.5 to 7 billion
    parameters.

    Args:
        source: The checkpoint.
        sources: What goes into weights.bin.
        num_layers: Layers of the model.
        calibration: What `calibration_bytes` gives.
    """
    tables = sum(entry.num_bytes for entry in sources if entry.name.startswith(_ROTARY))
    work = max(_work(source, entry) for entry in sources)
    process = _BUILD_PROCESS
    if calibration:
        process += _CALIBRATION_PROCESS
        calibrated = (
            _work(source, entry)
            for entry in sources
            if isinstance(entry, QuantizedSource) and entry.method == "gptq"
        )
        work = max(work, calibration + max(calibrated, default=0))
    return process + _BUILD_PER_LAYER * num_layers + tables + work


def calibration_bytes(source: Source, text: Path | None) -> int:
    """What gptq holds beside the libraries while it quantises linear layers.

    Args:
        source: The checkpoint; its tokenizer counts the text.
        text: The calibration text; None for another method, which adds nothing.

    Raises:
        OptionError: If the checkpoint is quantised already.
        ExportError: If the text cannot be read or is too short.
    """
    checkpoint = source.checkpoint
    if text is None or checkpoint is None:
        return 0
    if checkpoint.quantized:
        raise OptionError(
            f"--quantizer gptq calibrates float weights, but {source.name} is quantised already; "
            "leave it out"
        )
    # Here, because it imports torch.
    from qwen_export.quantization.calibration import ROWS_AT_A_TIME, read_calibration

    config = checkpoint.config
    rows, tokens = map(int, read_calibration(checkpoint, text).shape)
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    at_a_time = min(rows, ROWS_AT_A_TIME)
    hessians = 4 * (2 * hidden**2 + heads**2 + inner**2)
    layer = 4 * sum(
        math.prod(tensor.shape)
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("model.layers.0.")
    )
    states = 4 * rows * tokens * hidden
    # Eager attention: scores, their softmax and one in flight. MLP: gate, up and their product.
    scores = 4 * _HELD * at_a_time * config.num_attention_heads * tokens**2
    forward = max(scores, 4 * _HELD * at_a_time * tokens * inner)
    # Old and new states of a layer that runs, or a Hessian's factor in double precision.
    running = 2 * states + layer + forward
    factorising = states + 8 * _HELD * max(hidden, heads, inner) ** 2
    return hessians + max(running, factorising)


def verify_peak(config: ModelConfig, layout: Layout, *, precision: str) -> int:
    """Peak resident memory of a verified build, in bytes.

    Every arrangement is opened when the one before is gone, so that one more adds nothing. For
    products in fp32 ONNX Runtime dequantises whole tables of int8, and int4 block by block.

    Args:
        config: Gives the sizes of caches.
        layout: The weights in fp32, whatever the precision of the bundle.
        precision: Format of the bundle's weights.
    """
    tables = max(layout.head, layout.embedding)
    caches = kv_bytes(config, context=_VERIFY_TOKENS, batch=1, limit=_VERIFY_TOKENS)
    process, of_tables, of_linears = _VERIFY_HELD[precision]
    held = of_tables * tables + of_linears * layout.linears
    return process + round(held) + caches


def _work(source: Source, entry: WeightSource) -> int:
    if isinstance(entry, TensorSource):
        row = 4 * math.prod(entry.shape[1:])
        rows = max(1, BLOCK_BYTES // row)
        if entry.transposed:
            rows = max(rows, math.ceil(entry.shape[0] / MAX_PASSES))
        # The block being made, and the one before it.
        blocks = 2 * min(rows, entry.shape[0]) * row
        return _mapped(source, entry.name) + min(blocks, 2 * entry.num_bytes)
    inputs, outputs = entry.shape
    scales = 4 * (inputs // entry.format.block_size) * outputs
    return inputs * outputs + scales + _BUILD_SLICES * min(BLOCK_BYTES, 4 * inputs * outputs)


def _mapped(source: Source, name: str) -> int:
    checkpoint = source.checkpoint
    if checkpoint is None or name not in checkpoint.tensors:
        return 0
    return checkpoint.tensors[name].num_bytes
