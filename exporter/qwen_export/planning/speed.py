"""Decode speed from bytes: a step reads every weight once, and memory is what limits it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Speed", "expected_speed"]

# Share of the measured read bandwidth that a step's MatMuls reach with two threads, and what a
# layer costs beside them. Measured with benchmarks/plan.py on the Qwen2.5-0.5B shape; blocks of
# codes cost arithmetic too, so that fewer bytes a weight bring less than their share.
_SHARE = {"fp32": 0.83, "int8": 0.69, "int4": 0.61}
_SECONDS_PER_LAYER = 1e-4


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
    bytes_per_token: int, *, precision: str, num_layers: int, context: int, bandwidth: float
) -> Speed:
    """Turn bytes into tokens per second.

    Args:
        bytes_per_token: What a step reads.
        precision: Format of the weights.
        num_layers: Layers of the model.
        context: Tokens in the row's cache, for the result.
        bandwidth: Bytes per second that this machine reads.
    """
    seconds = bytes_per_token / (bandwidth * _SHARE[precision]) + _SECONDS_PER_LAYER * num_layers
    return Speed(context, bytes_per_token, bandwidth / bytes_per_token, 1 / seconds)
