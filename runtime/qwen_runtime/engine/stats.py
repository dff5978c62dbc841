"""What an engine is at and has done."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineStats"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A look at an engine. Rows are sequences that run: a beam search has several."""

    num_running: int
    """Requests that hold cache slots."""
    num_waiting: int
    """Requests that wait for some."""
    num_slots_used: int
    """Cache slots in use, those that other engines borrowed for drafts included."""
    max_running: int
    """Rows that run at once, at most."""
    max_waiting: int
    """Requests that may wait."""
    cache_tokens_used: int
    """Tokens that running rows may come to hold, all taken to be as long as the longest."""
    cache_tokens_limit: int
    """Most that may be."""
    num_prompt_tokens: int
    """Tokens of prompts since the start, those found in the cache included."""
    num_cached_tokens: int
    """Those found in the cache."""
    num_generated_tokens: int
    """Tokens generated since the start."""
    num_steps: int
    """Calls of the model since the start."""
