"""Decode speed from bytes: a step reads every weight once, and memory is what limits it."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_export.checkpoint import ModelConfig

__all__ = ["Speed", "expected_speed"]

# Of the portable graph: share of the measured read bandwidth that a step's MatMuls reach with two
# threads, and what a layer costs beside them. Measured with benchmarks/plan.py on the Qwen2.5-0.5B
# shape; blocks of codes cost arithmetic too, so that fewer bytes a weight bring less than their
# share.
_SHARE = {"fp32": 0.83, "int8": 0.69, "int4": 0.61}
_SECONDS_PER_LAYER = 1e-4
# Of the graph for the CPU: the same two, and seconds of attention for a token in the cache, a head
# and a layer, by head_dim and at least. Measured with benchmarks/lowered.py and peers/run.py on
# the Qwen2.5-0.5B shape with two threads, where 33 GB/s are read: at 128 and 900 tokens int8 takes
# 18 to 21 and 19 to 23 ms a step, int4 12 to 13 and 15 to 16. Heads of 32, in the embedded model,
# take as long as heads of 64.
_LOWERED_SHARE = {"int8": 0.87, "int4": 0.72}
_LOWERED_SECONDS_PER_LAYER = 5e-5
_ATTENTION_SECONDS, _LEAST_ATTENTION_SECONDS = 1.4e-10, 9e-9


@dataclass(frozen=True, slots=True)
class Speed:
    """Decode of one row on this machine's CPU."""

    context: int
    """Tokens in the row's cache."""
    bytes_per_token: int
    """Weights, scales and caches that a step reads."""
    ceiling: float
    """Tokens per second if reading them were all, at the measured bandwidth."""
    expected: float
    """Tokens per second with the share of the bandwidth that is reached."""


def expected_speed(
    config: ModelConfig,
    weights: int,
    caches: int,
    *,
    precision: str,
    context: int,
    bandwidth: float,
    lowered: bool,
) -> Speed:
    """Turn bytes into tokens per second.

    Args:
        config: Gives layers and heads.
        weights: Bytes of weights that a step reads.
        caches: Bytes of keys and values that it reads.
        precision: Format of the weights.
        context: Tokens in the row's cache.
        bandwidth: Bytes per second that this machine reads.
        lowered: Whether the CPU runs a graph of its own instead of the portable one.
    """
    num_bytes, layers = weights + caches, config.num_hidden_layers
    if lowered:
        each = max(_ATTENTION_SECONDS * config.head_dim, _LEAST_ATTENTION_SECONDS)
        attention = each * layers * config.num_attention_heads * context
        seconds = weights / (bandwidth * _LOWERED_SHARE[precision])
        seconds += _LOWERED_SECONDS_PER_LAYER * layers + max(attention, caches / bandwidth)
    else:
        seconds = num_bytes / (bandwidth * _SHARE[precision]) + _SECONDS_PER_LAYER * layers
    return Speed(context, num_bytes, bandwidth / num_bytes, 1 / seconds)
