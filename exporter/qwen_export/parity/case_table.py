"""The ways of running a bundle that a verification compares, by name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CASES",
    "GREEDY_DECODE",
    "GREEDY_PREFILL",
    "LOWERED_CASES",
    "LOWERED_COPIED",
    "LOWERED_GREEDY",
    "LOWERED_WHOLE",
    "OFF_BY_ONE",
    "PORTABLE_CASES",
    "PREFILL_COPIED",
    "PREFILL_WHOLE",
    "SERVED",
    "Case",
]


@dataclass(frozen=True, slots=True)
class Case:
    """A way of running the bundle."""

    key: str
    graph: str
    """The graph that made the logits."""
    description: str


PREFILL_WHOLE = "prefill whole"
PREFILL_COPIED = "prefill after a copied prefix"
SERVED = "as served"
OFF_BY_ONE = "past_lengths off by one"
GREEDY_PREFILL = "greedy on the prefill graph"
GREEDY_DECODE = "greedy decode"
LOWERED_WHOLE = "for the CPU: prefill whole"
LOWERED_COPIED = "for the CPU: prefill after a copied prefix"
LOWERED_GREEDY = "for the CPU: greedy"
_LOWERED_GRAPH = "lowered/cpu/prefill"
CASES = {
    case.key: case
    for case in (
        Case(PREFILL_WHOLE, "prefill", "each prompt in one call"),
        Case("prefill ragged", "prefill", "all prompts, each of its own length, in one call"),
        Case("prefill in chunks of 5", "prefill", "prompts of up to 48 tokens, 5 at a time"),
        Case("prefill in chunks of 96", "prefill", "longer prompts, 96 tokens at a time"),
        Case("prefill batch", "prefill", "rows of equal length in one call"),
        Case("prefill batch, row by row", "prefill", "the same rows, one call each"),
        Case(PREFILL_COPIED, "prefill", "half the prompt reused from a slot"),
        Case(GREEDY_PREFILL, "prefill", "one token a call, ragged batch"),
        Case(GREEDY_DECODE, "decode", "the same tokens through the decode graph, ragged batch"),
        Case("greedy decode, one row", "decode", "one prompt alone"),
        Case("greedy decode, growing", "decode", "capacity raised in the middle of an answer"),
        Case(LOWERED_WHOLE, _LOWERED_GRAPH, "each prompt in one call"),
        Case(LOWERED_COPIED, _LOWERED_GRAPH, "half the prompt reused from a slot"),
        Case(LOWERED_GREEDY, _LOWERED_GRAPH, "the same tokens, one a call, ragged batch"),
    )
}
"""In the order of the ladder: what comes later rests on what comes before."""
LOWERED_CASES = tuple(key for key, case in CASES.items() if case.graph == _LOWERED_GRAPH)
"""Of the graph that a bundle of quantised weights has for the CPU beside the portable ones."""
PORTABLE_CASES = tuple(key for key in CASES if key not in LOWERED_CASES)
"""Of the graphs that every bundle has."""
