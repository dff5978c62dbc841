"""What every engine offers to the loop above it.

Slots are rows of the KV cache. The runner knows how many tokens each slot holds; a caller names
slots and brings new tokens. For every row, past + new tokens <= capacity <= max_context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = [
    "ArgmaxRunner",
    "FloatArray",
    "IntArray",
    "Limits",
    "ModelRunner",
    "TopLogits",
    "TopLogitsRunner",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a runner can hold."""

    vocab_size: int
    max_context: int
    """Tokens a slot can hold at most."""


class ModelRunner(Protocol):
    """Runs a bundle's graphs over KV cache slots."""

    @property
    def limits(self) -> Limits:
        """Sizes that do not change."""

    @property
    def num_slots(self) -> int:
        """Slots allocated now."""

    @property
    def capacity(self) -> int:
        """Tokens a slot can hold now; `grow` raises it."""

    def allocate(self, slots: int, capacity: int) -> None:
        """Make room for at least so many slots of at least so many tokens, keeping contents.

        Much larger buffers may give way to smaller ones.

        Raises:
            CapacityError: If there is not enough memory, or a slot would exceed ``limits``.
        """

    def prefill(
        self,
        slots: Sequence[int],
        tokens: Sequence[IntArray],
        past: Sequence[int],
        want: Sequence[int],
    ) -> list[FloatArray]:
        """Run new tokens of several rows.

        Args:
            slots: Distinct slots, one per row.
            tokens: New token ids of each row, [S_i] with S_i >= 1.
            past: Tokens of each slot that stay valid; the new ones are written after them.
            want: How many of each row's last positions to return logits for, 0..S_i.

        Returns:
            Logits of each row, [want_i, V] float32.
        """

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """Append one token to each of several slots.

        Returns:
            Logits [len(slots), V] float32; valid until the next call.
        """

    def copy(self, src: int, dst: int, length: int) -> None:
        """Make ``dst`` hold the first ``length`` tokens of ``src``."""

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's tokens after the first ``length``."""

    def grow(self, capacity: int) -> None:
        """Raise the capacity to at least so many tokens, keeping contents; never lower it.

        Raises:
            CapacityError: If that is more than ``limits.max_context``, or there is not enough
                memory.
        """

    def close(self) -> None:
        """Release sessions and buffers; the runner cannot be used afterwards."""


@runtime_checkable
class ArgmaxRunner(Protocol):
    """What a `ModelRunner` may be able to do besides: choose tokens where the logits are."""

    @property
    def has_argmax(self) -> bool:
        """Whether `decode_argmax` works with these graphs."""

    def decode_argmax(self, slots: Sequence[int], tokens: Sequence[int]) -> IntArray:
        """As `ModelRunner.decode`, bringing only each row's best token.

        Returns:
            The token with the highest logit, the lowest of equal ones, [len(slots)]; valid until
            the next call.

        Raises:
            BackendError: If a row's logits hold a NaN.
        """


@dataclass(frozen=True, slots=True)
class TopLogits:
    """What is highest among each row's logits of a step."""

    best: IntArray
    """The token with the highest logit, the lowest of equal ones, [rows]."""
    logits: FloatArray
    """The highest logits, [rows, K]: no other one of the row is higher than the lowest of them."""
    tokens: IntArray
    """Their token ids, [rows, K]; where equal logits compete for the last places, any of them."""


@runtime_checkable
class TopLogitsRunner(Protocol):
    """What a `ModelRunner` may be able to do besides: find the highest logits where they are."""

    @property
    def num_top(self) -> int:
        """How many of a row `decode_top` brings; 0 where it does not work with these graphs."""

    def decode_top(self, slots: Sequence[int], tokens: Sequence[int]) -> TopLogits:
        """As `ModelRunner.decode`, bringing only each row's highest logits.

        Returns:
            Rows as in ``slots``; valid until the next call.

        Raises:
            BackendError: If a row's logits hold a NaN.
        """

    def whole_logits(self, slots: Sequence[int]) -> FloatArray:
        """All logits of some rows of the step that `decode_top` ran just before.

        Args:
            slots: Of those rows.

        Returns:
            [len(slots), V] float32; valid until the next call.
        """
