"""Which tokens lie in which cache slots. Knows no backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_runtime.generation.base import IntArray

__all__ = ["KEPT_SLOTS", "KEPT_STEPS", "MIN_SHARED", "PrefixCache", "shared_length"]

KEPT_SLOTS = 4
"""Slots that keep their tokens after their request, by default."""

KEPT_STEPS = 400
"""Decode steps that a kept slot may make slower by its length alone. Where attention costs most, on
a wide model with many layers, they then have cost about as much as computing it again
(benchmarks/kv.py); where it costs little, little is lost."""

MIN_SHARED = 16
"""Tokens; a call streams all weights however few tokens it has, so less is not worth a copy."""


class PrefixCache:
    """Remembers the beginnings of slots that hold what a fresh prefill of their tokens writes.

    A call of one token rounds differently from a call of several: keys and values of generated
    tokens differ from prefilled ones in the last bits. Some kernels take the tokens of a call in
    pairs (ONNX Runtime's for 8-bit weights) and an odd one at its end like a call of one. So a
    slot's beginning counts as far as all of it was prefilled, the odd token at the end of a call
    excepted, and it is reused up to an even position, from where pairs are the same as from 0.
    Whether a slot is in use makes none either: its beginning stays as it is while its request
    runs.

    Args:
        max_slots: Slots 0..max_slots-1 keep their tokens when their request is done; 0 remembers
            nothing at all.
    """

    def __init__(self, max_slots: int) -> None:
        self.max_slots = max_slots
        self._tokens: dict[int, IntArray] = {}
        self._touched: dict[int, int] = {}
        self._costly_steps: dict[int, int] = {}
        self._clock = 0

    def tokens(self, slot: int) -> IntArray:
        """What a slot is known to begin with, [length]; not to be changed."""
        return self._tokens.get(slot, _NOTHING)

    def find(self, tokens: IntArray, limit: int, *, near: int) -> tuple[int, int]:
        """The slot with the longest common beginning.

        Args:
            tokens: A prompt, [S].
            limit: Tokens wanted at most.
            near: The slot preferred among equals: its own, which needs no copy.

        Returns:
            The slot and how many tokens in common to use, an even number; ``near`` and 0 where
            no MIN_SHARED are.
        """
        best, length = near, 0
        for slot in sorted(self._tokens, key=lambda slot: slot != near):
            shared = _even(min(shared_length(self._tokens[slot], tokens), limit))
            if shared > length:
                best, length = slot, shared
        if length < MIN_SHARED:
            return near, 0
        self._touch(best)
        return best, length

    def truncate(self, slot: int, length: int) -> None:
        """A slot is about to be written after its first ``length`` tokens."""
        known = self._tokens.get(slot)
        if known is not None and len(known) > length:
            self._remember(slot, known[:length])

    def wrote(self, slot: int, past: int, tokens: IntArray) -> None:
        """One call has written ``tokens`` after the first ``past`` of a slot."""
        known = self.tokens(slot)[:past]
        if self.max_slots and len(known) == past:
            known = np.concatenate([known, tokens[: _even(len(tokens))]])
        self._remember(slot, known)

    def copied(self, src: int, dst: int, length: int) -> None:
        """The first ``length`` tokens of ``src`` were copied to ``dst``."""
        self._remember(dst, self.tokens(src)[:length])

    def keep(self, slot: int) -> int:
        """How many tokens of a released slot are worth keeping.

        None where the slot is not one of those that keep their tokens, where they are few, and
        where another one begins with them.
        """
        known = self.tokens(slot)
        elsewhere = any(
            shared_length(other, known) == len(known)
            for at, other in self._tokens.items()
            if at != slot and at < self.max_slots
        )
        if slot >= self.max_slots or len(known) < MIN_SHARED or elsewhere:
            self.forget(slot)
            return 0
        self._touch(slot)
        return len(known)

    def covered_by(self, slot: int, kept: Sequence[int]) -> list[int]:
        """Those of the kept slots whose tokens are the beginning of what a slot holds."""
        known = self.tokens(slot)
        return [
            other
            for other in kept
            if other != slot
            and shared_length(self.tokens(other), known) == len(self.tokens(other))
        ]

    def kept(self, used: Sequence[int]) -> list[int]:
        """Slots with tokens that no request uses, the one untouched for longest first."""
        return sorted(set(self._tokens) - set(used), key=lambda slot: self._touched.get(slot, 0))

    def charge(self, slots: Sequence[int], length: int) -> list[int]:
        """Count a decode step against slots that hold more than ``length`` tokens.

        Returns:
            Slots that have cost as much as they can save.
        """
        costly = [slot for slot in slots if len(self.tokens(slot)) > length]
        for slot in costly:
            self._costly_steps[slot] = self._costly_steps.get(slot, 0) + 1
        return [slot for slot in costly if self._costly_steps[slot] > KEPT_STEPS]

    def forget(self, slot: int) -> None:
        """What a slot holds is no longer known."""
        self._tokens.pop(slot, None)
        self._touched.pop(slot, None)
        self._costly_steps.pop(slot, None)

    def clear(self) -> None:
        """Nothing is known any longer."""
        self._tokens.clear()
        self._touched.clear()
        self._costly_steps.clear()

    def _remember(self, slot: int, tokens: IntArray) -> None:
        if len(tokens):
            self._tokens[slot] = tokens
            self._touch(slot)
        else:
            self.forget(slot)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._touched[slot] = self._clock
        self._costly_steps.pop(slot, None)


def shared_length(first: IntArray, second: IntArray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _even(count: int) -> int:
    return count - count % 2


_NOTHING: IntArray = np.empty(0, np.int64)
