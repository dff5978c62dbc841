"""The contract between a mode of generation and the loop.

A mode is a state machine. The loop asks it what to run next (`Decoding.next_step`), runs that for
many requests at once, and hands back the logits (`Decoding.accept`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = [
    "Decoding",
    "Feed",
    "FinishReason",
    "FloatArray",
    "IntArray",
    "RowCopy",
    "Step",
    "TokenChoice",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
FinishReason = str
"""Why a row ended: "stop", "length" or "cancelled"; a request that fails raises."""


@dataclass(slots=True)
class TokenChoice:
    """How a feed can do without its logits: by its best token, or by the highest logits alone."""

    token: int | None = None
    """Where the loop leaves the one with the highest logit, the lowest of equal ones; None where
    the choice `take`s more, or logits came instead."""
    num_top: int = 0
    """How many of the highest logits decide at least; 0 where the best token is enough."""
    take: Callable[[FloatArray, IntArray], bool] | None = None
    """Given with `num_top`: looks at the highest logits, [N], and their token ids, [N], in any
    order, and says whether they were enough; if not, all logits are wanted as usual."""


@dataclass(frozen=True, slots=True)
class Feed:
    """New tokens for one row of a request."""

    row: int
    """Row of the request, 0..num_rows-1."""
    tokens: IntArray
    """Token ids to run, [S] with S >= 1."""
    past: int
    """Tokens of the row that stay valid; fewer than it holds forgets the rest."""
    want: int
    """How many of the last positions' logits are wanted, 0..S."""
    choice: TokenChoice | None = None
    """Given where less than all logits may serve, for one token with ``want`` 1: if the loop sets
    its token or it takes the highest logits, the feed's logits are empty, [1, 0]."""


@dataclass(frozen=True, slots=True)
class RowCopy:
    """Make row ``dst`` hold the first ``length`` tokens of row ``src``."""

    src: int
    dst: int
    length: int


@dataclass(frozen=True, slots=True)
class Step:
    """What a request wants done next: copies first, then feeds."""

    feeds: tuple[Feed, ...]
    copies: tuple[RowCopy, ...] = ()
    on_draft: bool = False
    """Whether it is for the request's draft model and the rows it has there."""


class Decoding(Protocol):
    """One request's state machine."""

    @property
    def num_rows(self) -> int:
        """Cache rows the request needs for all its life; as many in a draft model, if it has one."""

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to run."""

    def next_step(self) -> Step:
        """What to run next; called once per step, and not when finished."""

    def accept(self, logits: Sequence[FloatArray]) -> None:
        """Take the logits of the last step, [want, V] for every feed, in order.

        The arrays may be overwritten after the call.
        """

    def note_cached(self, row: int, num_tokens: int) -> None:
        """Learn that a row's first tokens were not computed: another request had left them.

        Called before `accept`, for the step that brings the row's prompt.
        """

    def cancel(self) -> None:
        """Finish now."""
