"""Weight-only quantisation: formats, and methods that choose codes and scales."""

from __future__ import annotations

from qwen_export.quantization.options import BLOCK_SIZES, METHODS, Method, QuantizationOptions
from qwen_export.quantization.quantizer import Quantizer, columns_at_a_time, make_quantizer
from qwen_export.quantization.tensor import QuantizedTensor, code_range

__all__ = [
    "BLOCK_SIZES",
    "METHODS",
    "Method",
    "QuantizationOptions",
    "QuantizedTensor",
    "Quantizer",
    "code_range",
    "columns_at_a_time",
    "make_quantizer",
]
