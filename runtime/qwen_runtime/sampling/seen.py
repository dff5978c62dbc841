"""The distinct tokens of a growing sequence, kept from step to step."""

from __future__ import annotations

import numpy as np

from qwen_runtime.sampling.numerics import BoolArray, IdArray

__all__ = ["SeenTokens"]


class SeenTokens:
    """Distinct token ids of a sequence in order of first appearance.

    A step costs the comparison with the history it already knows plus the new tokens. A
    sequence that was cut back or replaced is noticed and followed, so the answer never depends
    on earlier calls.

    Args:
        vocab_size: Ids at or above it are left out: their scores do not exist.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._seen = np.zeros(vocab_size, dtype=np.bool_)
        self._history = np.empty(64, dtype=np.int64)
        self._length = 0
        # Distinct ids and the index of each one's first appearance, both in that order.
        self._ids = np.empty(64, dtype=np.int64)
        self._first = np.empty(64, dtype=np.int64)
        self._count = 0

    def update(self, input_ids: IdArray) -> IdArray:
        """Follow the sequence to its current state.

        Args:
            input_ids: The whole sequence, [length].

        Returns:
            Its distinct ids below ``vocab_size``, [distinct]; a view, valid until the next call.
        """
        shared = min(self._length, input_ids.shape[0])
        if not np.array_equal(self._history[:shared], input_ids[:shared]):
            shared = int(np.argmax(self._history[:shared] != input_ids[:shared]))
        if shared < self._length:
            self._cut(shared)
        if shared < input_ids.shape[0]:
            self._append(input_ids[shared:])
        return self._ids[: self._count]

    def among(self, ids: IdArray) -> BoolArray:
        """Which of some ids below ``vocab_size`` the sequence holds, [N]."""
        return self._seen[ids]

    def _cut(self, length: int) -> None:
        count = int(np.searchsorted(self._first[: self._count], length))
        self._seen[self._ids[count : self._count]] = False
        self._count = count
        self._length = length

    def _append(self, new_ids: IdArray) -> None:
        start, end = self._length, self._length + new_ids.shape[0]
        self._history = _with_room(self._history, start, end)
        self._history[start:end] = new_ids
        self._length = end
        possible = np.flatnonzero(new_ids < self.vocab_size)
        possible = possible[~self._seen[new_ids[possible]]]
        if possible.shape[0] > 1:
            _, first = np.unique(new_ids[possible], return_index=True)
            possible = possible[np.sort(first)]
        count = self._count + possible.shape[0]
        self._ids = _with_room(self._ids, self._count, count)
        self._first = _with_room(self._first, self._count, count)
        self._ids[self._count : count] = new_ids[possible]
        self._first[self._count : count] = start + possible
        self._seen[new_ids[possible]] = True
        self._count = count


def _with_room(buffer: IdArray, used: int, needed: int) -> IdArray:
    """The buffer itself, or a copy of its used part in one of at least twice the size."""
    if needed <= buffer.shape[0]:
        return buffer
    larger = np.empty(max(needed, 2 * buffer.shape[0]), dtype=np.int64)
    larger[:used] = buffer[:used]
    return larger
