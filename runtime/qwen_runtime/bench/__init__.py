"""How fast a bundle answers on this machine: time to first token, time per token, bandwidth."""

from __future__ import annotations

from qwen_runtime.bench.benchmark import bench
from qwen_runtime.bench.options import BenchOptions
from qwen_runtime.bench.page import render
from qwen_runtime.bench.result import BenchResult, BundleFacts, LengthResult, Percentiles, Run
from qwen_runtime.bench.table import table

__all__ = [
    "BenchOptions",
    "BenchResult",
    "BundleFacts",
    "LengthResult",
    "Percentiles",
    "Run",
    "bench",
    "render",
    "table",
]
