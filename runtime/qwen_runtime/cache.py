"""KV cache buffers that the caller owns and the graphs update in place."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import CapacityError

__all__ = ["GROWTH_STEP", "KVCache", "rounded_capacity"]

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

        Where the buffers are more than twice what is asked for and held, they give way to smaller
        ones; otherwise they keep at least their size, unless memory runs out.

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
        held = np.flatnonzero(self._lengths)
        needed_slots = max(slots, int(held[-1]) + 1 if len(held) else 0)
        longest = int(self._lengths.max(initial=0))
        needed = min(rounded_capacity(max(capacity, longest)), self.max_context)
        least, now = (needed_slots, needed), (self.num_slots, self.capacity)
        if math.prod(now) <= 2 * math.prod(least):
            needed_slots, needed = max(slots, self.num_slots), max(needed, self.capacity)
        if (needed_slots, needed) == now:
            return False
        try:
            buffers = self._zeros(needed_slots, needed)
        except CapacityError:
            if least in (now, (needed_slots, needed)):
                raise
            needed_slots, needed = least
            buffers = self._zeros(needed_slots, needed)
        lengths = np.zeros(needed_slots, np.int64)
        stay = min(needed_slots, self.num_slots)
        lengths[:stay] = self._lengths[:stay]
        try:
            # Memory is taken when a buffer is written: growing takes one buffer more, not all, and
            # none for what no slot holds.
            for name, old in self._buffers.items() if len(held) else ():
                for slot in held:
                    length = self._lengths[slot]
                    buffers[name][slot, :, :length] = old[slot, :, :length]
                self._buffers[name] = buffers[name]
        except BaseException:
            self.clear()  # buffers of two sizes are of no use
            raise
        self._buffers, self._lengths = buffers, lengths
        self.num_slots, self.capacity = needed_slots, needed
        return True

    def _zeros(self, slots: int, capacity: int) -> dict[str, npt.NDArray[np.generic]]:
        shape = (slots, self._heads, capacity, self._head_dim)
        try:
            return {name: _pages(shape, self.dtype) for name in self.names}
        except (MemoryError, OSError, OverflowError, ValueError) as error:
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


def _pages(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[np.generic]:
    """Zeros whose memory is taken page by page when they are written.

    NumPy asks for huge pages: then a few tokens of each slot take all of a buffer, and growing
    waits until the kernel has found and zeroed so much.
    """
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # of a kernel that knows no huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)


def rounded_capacity(tokens: int) -> int:
    """The capacity of buffers for so many tokens, where the limit allows it."""
    return -(-tokens // GROWTH_STEP) * GROWTH_STEP
