"""KV cache buffers that the caller owns and the graphs update in place."""

from __future__ import annotations

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

        Returns:
            Whether buffers were replaced, so that bindings to them are void.

        Raises:
            CapacityError: If ``capacity`` is more than ``max_context``.
        """
        if capacity > self.max_context:
            raise CapacityError(
                f"a row must have at most {self.max_context} tokens (the bundle's max_context), "
                f"got {capacity}; shorten it, or rebuild the bundle with a larger --max-context"
            )
        slots = max(slots, self.num_slots)
        rounded = min(-(-capacity // GROWTH_STEP) * GROWTH_STEP, self.max_context)
        capacity = max(rounded, self.capacity)
        if (slots, capacity) == (self.num_slots, self.capacity):
            return False
        shape = (slots, self._heads, capacity, self._head_dim)
        for name in self.names:
            # One buffer at a time, so that growing needs room for one more buffer, not twice all.
            buffer = np.zeros(shape, self.dtype)
            if name in self._buffers:
                buffer[: self.num_slots, :, : self.capacity] = self._buffers[name]
            self._buffers[name] = buffer
        lengths = np.zeros(slots, np.int64)
        lengths[: self.num_slots] = self._lengths
        self._lengths, self.num_slots, self.capacity = lengths, slots, capacity
        return True

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
