"""KV cache buffers that the caller owns and the graphs update in place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import CapacityError

__all__ = ["GROWTH_STEP", "KVCache"]

GROWTH_STEP = 256
"""Tokens; capacities are multiples of it (or the bundle's limit). Attention costs by capacity, so
it stays close to the length."""


class KVCache:
    """Key and value buffers of every layer, [slots, kv_heads, capacity, head_dim] each.

    Args:
        names: Graph names of the buffers, "0.key", "0.value", "1.key", ...
        num_key_value_heads: Heads per buffer.
        head_dim: Size of a head.
        dtype: Element type of the caches.
        max_context: Largest capacity.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        num_key_value_heads: int,
        head_dim: int,
        dtype: npt.DTypeLike,
        max_context: int,
    ) -> None:
        self.names = tuple(names)
        self.max_context = max_context
        self.num_slots = 0
        self.capacity = 0
        self._heads, self._head_dim, self.dtype = num_key_value_heads, head_dim, np.dtype(dtype)
        self._buffers: dict[str, npt.NDArray[np.generic]] = {}
        self._lengths = np.zeros(0, np.int64)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens in each slot, [slots]; the array itself, not a copy."""
        return self._lengths

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def rows(self, first: int, last: int) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        """Name and view of slots first..last-1 of every buffer; C-contiguous."""
        for name, buffer in self._buffers.items():
            yield name, buffer[first:last]

    def reserve(self, slots: int, capacity: int) -> bool:
        """Make room for so many slots and tokens, keeping contents.

        Where no slot holds a token and the buffers are more than twice what is asked for, they
        give way to smaller ones.

        Returns:
            Whether buffers were replaced, so that bindings to them are void.

        Raises:
            CapacityError: If ``capacity`` is more than ``max_context``, or there is not enough
                memory; everything is as before then.
        """
        if capacity > self.max_context:
            raise CapacityError(
                f"a row must have at most {self.max_context} tokens (the bundle's max_context), "
                f"got {capacity}; shorten it, or rebuild the bundle with a larger --max-context"
            )
        capacity = min(-(-capacity // GROWTH_STEP) * GROWTH_STEP, self.max_context)
        holds = bool(self._lengths.any())
        if holds or self.num_slots * self.capacity <= 2 * slots * capacity:
            slots, capacity = max(slots, self.num_slots), max(capacity, self.capacity)
        if (slots, capacity) == (self.num_slots, self.capacity):
            return False
        buffers = self._zeros(slots, capacity)
        lengths = np.zeros(slots, np.int64)
        try:
            # Memory is taken when a buffer is written: growing takes one buffer more, not all.
            for name, old in self._buffers.items() if holds else ():
                lengths[: self.num_slots] = self._lengths
                buffers[name][: self.num_slots, :, : self.capacity] = old
                self._buffers[name] = buffers[name]
        except BaseException:
            self.clear()  # buffers of two sizes are of no use
            raise
        self._buffers, self._lengths = buffers, lengths
        self.num_slots, self.capacity = slots, capacity
        return True

    def _zeros(self, slots: int, capacity: int) -> dict[str, npt.NDArray[np.generic]]:
        shape = (slots, self._heads, capacity, self._head_dim)
        try:
            return {name: np.zeros(shape, self.dtype) for name in self.names}
        except (MemoryError, ValueError) as error:  # ValueError: more than can be addressed
            size = len(self.names) * math.prod(shape) * self.dtype.itemsize
            raise CapacityError(
                f"{slots} rows of {capacity} tokens need {size} bytes of KV cache, which is more "
                "than there is memory for; ask for fewer rows or shorter ones"
            ) from error

    def copy(self, src: int, dst: int, length: int) -> None:
        """Make slot ``dst`` hold the first ``length`` tokens of slot ``src``."""
        if src != dst:
            for buffer in self._buffers.values():
                buffer[dst, :, :length] = buffer[src, :, :length]
        self._lengths[dst] = length

    def clear(self) -> None:
        """Release the buffers."""
        self._buffers.clear()
        self._lengths = np.zeros(0, np.int64)
        self.num_slots = self.capacity = 0
