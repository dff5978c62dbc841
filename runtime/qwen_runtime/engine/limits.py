"""How much an engine runs at once, and lets wait."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_runtime.errors import RequestError

__all__ = [
    "IDLE_CHUNK_SIZE",
    "MAX_NUM_SEQS",
    "MAX_QUEUED_REQUESTS",
    "PREFILL_CHUNK_SIZE",
    "EngineLimits",
]

MAX_NUM_SEQS = 32
"""Rows at once. With the shape of Qwen2.5-0.5B in int8 on two cores a decode step of 32 rows costs
1.5 times one of 16; 64 rows bring a few percent more tokens than 32 (docs/decisions.md)."""

MAX_QUEUED_REQUESTS = 256
"""Requests that wait: what 32 rows work off in a few minutes."""

PREFILL_CHUNK_SIZE = 32
"""Tokens. A running row waits for one chunk between two of its tokens: with the shape of
Qwen2.5-0.5B in int8 on two cores 32 tokens take 90 ms and a decode step of 16 rows 70 ms; of 64
tokens a row would wait more than twice a step. Larger chunks gain a fifth in speed, at most."""

CHUNK_ROWS = 16
"""Decoding rows for which a chunk is meant: the step of twice as many takes 1.6 times as long, so
that twice the tokens delay none of them by more than before, in steps."""

IDLE_CHUNK_SIZE = 512
"""Tokens while nothing decodes: what the CPU runner takes in one call."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much an engine runs at once, and lets wait.

    Raises:
        RequestError: If one is no integer in its range; it names it.
    """

    max_num_seqs: int = MAX_NUM_SEQS
    """Rows that run at once, >= 1."""
    max_queued_requests: int = MAX_QUEUED_REQUESTS
    """Requests that wait for a row, >= 0."""
    prefill_chunk_size: int = PREFILL_CHUNK_SIZE
    """Tokens of prompts that run between two decode steps, an even number >= 16; see
    `chunk_size`."""
    idle_chunk_size: int = IDLE_CHUNK_SIZE
    """The same while nothing decodes. Where results depend on cuts, it has to be equal, so that
    results do not depend on load."""
    max_cache_tokens: int | None = None
    """Tokens that running rows may come to hold, all taken to be as long as the longest; None
    sets no limit."""

    def __post_init__(self) -> None:
        _require("max_num_seqs", self.max_num_seqs, 1)
        _require("max_queued_requests", self.max_queued_requests, 0)
        _require("prefill_chunk_size", self.prefill_chunk_size, 16)
        _require("idle_chunk_size", self.idle_chunk_size, 16)
        for name in ("prefill_chunk_size", "idle_chunk_size"):
            if getattr(self, name) % 2:
                raise RequestError(
                    f"{name} must be even, because some kernels take tokens in pairs, got "
                    f"{getattr(self, name)}",
                    param=name,
                )
        if self.max_cache_tokens is not None:
            _require("max_cache_tokens", self.max_cache_tokens, 1)

    def chunk_size(self, num_rows: int) -> int:
        """Tokens of prompts that run before so many rows go on.

        ``prefill_chunk_size`` for each 16 rows, rounded, but no more than while none decodes:
        multiples of one size, so that cuts stay on one grid.
        """
        if not num_rows:
            return self.idle_chunk_size
        times = max(1, (num_rows + CHUNK_ROWS // 2) // CHUNK_ROWS)
        return max(
            self.prefill_chunk_size, min(times * self.prefill_chunk_size, self.idle_chunk_size)
        )

    def fits(self, num_rows: int, num_tokens: int) -> bool:
        """Whether so many rows may run at once.

        Args:
            num_rows: Rows that hold slots, those that would be added included.
            num_tokens: Tokens that the longest of them may come to hold.
        """
        limit = self.max_cache_tokens
        return num_rows <= self.max_num_seqs and (limit is None or num_rows * num_tokens <= limit)


def _require(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} must be an integer >= {least}, got {value!r}", param=name)
