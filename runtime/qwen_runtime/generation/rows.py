"""What a generated row consists of, whatever the mode that generates it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from qwen_runtime.generation.base import Decoding, FloatArray, IntArray
from qwen_runtime.generation.stopping import Stop
from qwen_runtime.resolved_config import ResolvedConfig
from qwen_runtime.sampling import TokenGenerator, make_generator

__all__ = [
    "Generation",
    "RowState",
    "TokenLogprob",
    "TokenStreamer",
    "make_generators",
    "token_logprob",
]


class TokenStreamer(Protocol):
    """What transformers calls a streamer: the prompt first, then every step's tokens."""

    def put(self, value: IntArray) -> None:
        """Receive ids, [rows, S]."""

    def end(self) -> None:
        """The generation is over."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a generated token under the model, before any processor."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens and their log-probabilities, best first."""


@dataclass(slots=True)
class RowState:
    """What one row has generated."""

    token_ids: list[int] = field(default_factory=list)
    """Generated ids, the end token included, pads excluded."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stop: Stop | None = None
    """Why the row ended; None while it runs."""
    num_cached_tokens: int = 0
    """Tokens of its prompt that were not computed but found in the cache."""


class Generation(Decoding, Protocol):
    """A state machine whose rows can be returned."""

    config: ResolvedConfig
    rows: list[RowState]
    """What is returned, row by row; a beam search fills it in when it ends."""
    scores: list[FloatArray]
    """Processed scores of every step, [score rows, V] each, if asked for."""
    logits: list[FloatArray]
    """The model's logits of every step, [score rows, V] each, if asked for."""

    @property
    def input_ids(self) -> IntArray:
        """Prompt and generated ids with padding, [rows, length]."""

    def prompt_tokens(self, row: int) -> IntArray:
        """Prompt ids of a row, without pads."""

    def score_rows(self, row: int) -> Sequence[int]:
        """For every step, the row of ``scores`` and ``logits`` that belongs to a row."""


def make_generators(config: ResolvedConfig, count: int) -> list[TokenGenerator] | None:
    """One source of random numbers per row; None where nothing is drawn.

    Rows share torch's one generator, as in transformers; ours is a stream of its own for each.
    """
    if not config.do_sample:
        return None
    if config.rng == "torch":
        return [make_generator("torch", config.seed)] * count
    first = make_generator("default", config.seed)
    seed = getattr(first, "seed", config.seed)
    return [first, *(make_generator("default", seed, stream=i) for i in range(1, count))]


def token_logprob(logits: FloatArray, token: int, num_top: int) -> TokenLogprob:
    """Log-probability of a token and of the most likely ones.

    Args:
        logits: The model's output, [V].
        token: The token.
        num_top: How many of the most likely tokens to add.
    """
    peak = logits.max()
    normalizer = peak + np.log(np.exp(logits - peak).sum(dtype=np.float64))
    top: list[tuple[int, float]] = []
    if num_top:
        best = np.argpartition(logits, -num_top)[-num_top:]
        best = best[np.argsort(-logits[best], kind="stable")]
        top = [(int(i), float(logits[i] - normalizer)) for i in best]
    return TokenLogprob(token, float(logits[token] - normalizer), tuple(top))
