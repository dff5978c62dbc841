"""Quantised checkpoints: GPTQ, AWQ, compressed-tensors and FP8, opened as plain weights."""

from __future__ import annotations

from qwen_export.checkpoint.quantized.parts import Part, StoredTensors
from qwen_export.checkpoint.quantized.resolve import (
    METHODS,
    ResolvedTensors,
    read_method,
    resolve_tensors,
)
from qwen_export.checkpoint.quantized.weight import IntArray, IntegerWeight, QuantizedWeight

__all__ = [
    "METHODS",
    "IntArray",
    "IntegerWeight",
    "Part",
    "QuantizedWeight",
    "ResolvedTensors",
    "StoredTensors",
    "read_method",
    "resolve_tensors",
]
