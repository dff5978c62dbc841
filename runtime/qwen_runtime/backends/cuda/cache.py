"""KV caches on the device: a buffer for each layer's keys and one for its values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_runtime.backends.base import IntArray
from qwen_runtime.backends.cuda.blocks import rounded_slots
from qwen_runtime.backends.device_memory import DeviceMemory
from qwen_runtime.backends.device_seam import DeviceMemoryError, DeviceSeam
from qwen_runtime.cache import rounded_capacity
from qwen_runtime.errors import BackendError, CapacityError

__all__ = ["DeviceKVCache"]

_PAGE = 2 << 20
"""Bytes; CUDA gives memory out in such pages."""


class DeviceKVCache:
    """The buffers, [slots, kv_heads, capacity, head_dim] each, and what each slot holds.

    Args:
        seam: CUDA.
        memory: Where buffers are allocated.
        stream: What copies run on.
        names: Of the buffers: "0.key", "0.value", "1.key", ...
        heads: Heads per buffer.
        token_bytes: head_dim elements of the caches' type.
        max_context: Largest capacity.
    """

    def __init__(
        self,
        seam: DeviceSeam,
        memory: DeviceMemory,
        stream: int,
        *,
        names: Sequence[str],
        heads: int,
        token_bytes: int,
        max_context: int,
    ) -> None:
        self._seam, self._memory, self._stream = seam, memory, stream
        self._names, self._heads, self._token_bytes = tuple(names), heads, token_bytes
        self._max_context = max_context
        self._buffers: dict[str, int] = {}
        self._lengths = np.zeros(0, np.int64)
        self.capacity = 0

    @property
    def lengths(self) -> IntArray:
        """Tokens in each slot, [slots]; the array itself, not a copy."""
        return self._lengths

    @property
    def num_slots(self) -> int:
        """Slots of every buffer."""
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return len(self._buffers) * self._size(self.num_slots, self.capacity)

    def addresses(self, first: int) -> Iterator[tuple[str, int]]:
        """Every buffer's name and the address of its slot ``first``."""
        offset = first * self._size(1, self.capacity)
        for name, address in self._buffers.items():
            yield name, address + offset

    def target(self, slots: int, capacity: int) -> tuple[int, int]:
        """The size that `resize` should give the buffers so that there is room for so much.

        As of `qwen_runtime.cache.KVCache`: what is held stays, buffers keep at least their size,
        and give way to smaller ones where they are more than twice what is needed.

        Args:
            slots: Slots wanted.
            capacity: Tokens wanted in each.

        Raises:
            CapacityError: If ``capacity`` is more than a slot can ever hold.
        """
        if capacity > self._max_context:
            raise CapacityError(
                f"a row must have at most {self._max_context} tokens (the bundle's max_context), "
                f"got {capacity}; shorten it, or rebuild the bundle with a larger --max-context"
            )
        least, now = self.least(slots, capacity), (self.num_slots, self.capacity)
        roomy = (rounded_slots(least[0]), least[1])
        if math.prod(now) > 2 * math.prod(roomy):
            return roomy
        if least[0] <= now[0] and least[1] <= now[1]:
            return now
        return max(roomy[0], now[0]), max(roomy[1], now[1])

    def least(self, slots: int, capacity: int) -> tuple[int, int]:
        """The smallest size with room for so much, and for what is held."""
        held = np.flatnonzero(self._lengths)
        longest = int(self._lengths.max(initial=0))
        return (
            max(slots, int(held[-1]) + 1 if len(held) else 0),
            min(rounded_capacity(max(capacity, longest)), self._max_context),
        )

    def resize(self, slots: int, capacity: int) -> None:
        """Give every buffer a new size, keeping what slots hold; all of them move.

        One buffer after the other, so that it takes room for one more and not for all.

        Args:
            slots: At least those that hold something.
            capacity: At least what any holds.

        Raises:
            CapacityError: If there is not enough memory; everything is as before then.
            BackendError: If memory ends half-way, because others took it; nothing is held then.
        """
        new = _pages(self._size(slots, capacity))
        old = _pages(self._size(self.num_slots, self.capacity))
        held, count = self._lengths.any(), len(self._names)
        needed = max(new, count * (new - old) + old) if held else count * (new - old)
        self._seam.synchronise(self._stream)
        if needed > self._seam.free_bytes():
            raise self._too_large(slots, capacity)
        if not held:
            self.clear()
        lengths = np.zeros(slots, np.int64)
        stay = min(slots, self.num_slots)
        lengths[:stay] = self._lengths[:stay]
        try:
            for name in self._names:
                self._replace(name, slots, capacity)
        except DeviceMemoryError as error:
            self.clear()
            raise BackendError(
                f"GPU memory ended while the KV cache was given {slots} rows of {capacity} tokens "
                f"({error}), and what it held is lost; keep other programs off the GPU, or ask for "
                "fewer rows"
            ) from error
        except BaseException:
            self.clear()  # buffers of two sizes are of no use
            raise
        self._lengths, self.capacity = lengths, capacity

    def copy(self, src: int, dst: int, length: int) -> None:
        """Make slot ``dst`` hold the first ``length`` tokens of slot ``src``.

        The copy is done before whatever the stream is given next.
        """
        if src != dst and length:
            slot, pitch = self._size(1, self.capacity), self.capacity * self._token_bytes
            for address in self._buffers.values():
                self._seam.on_device_2d(
                    address + dst * slot,
                    address + src * slot,
                    pitch=pitch,
                    width=length * self._token_bytes,
                    height=self._heads,
                    stream=self._stream,
                )
        self._lengths[dst] = length

    def clear(self) -> None:
        """Free the buffers; nothing may be pending."""
        for address in self._buffers.values():
            self._memory.free(address)
        self._buffers.clear()
        self._lengths = np.zeros(0, np.int64)
        self.capacity = 0

    def _replace(self, name: str, slots: int, capacity: int) -> None:
        size = self._size(slots, capacity)
        new = self._memory.allocate(size)
        old = self._buffers.get(name)
        # Masked positions are multiplied by zero, and what was there before could be a NaN.
        self._seam.zero(new, size, self._stream)
        if old is not None:
            for slot in np.flatnonzero(self._lengths).tolist():
                self._seam.on_device_2d(
                    new + slot * self._size(1, capacity),
                    old + slot * self._size(1, self.capacity),
                    pitch=capacity * self._token_bytes,
                    source_pitch=self.capacity * self._token_bytes,
                    width=int(self._lengths[slot]) * self._token_bytes,
                    height=self._heads,
                    stream=self._stream,
                )
        # Nothing may be pending when memory is freed: here, and by whoever asked for this.
        self._seam.synchronise(self._stream)
        if old is not None:
            self._memory.free(old)
        self._buffers[name] = new

    def _size(self, slots: int, capacity: int) -> int:
        return slots * self._heads * capacity * self._token_bytes

    def _too_large(self, slots: int, capacity: int) -> CapacityError:
        total = len(self._names) * self._size(slots, capacity)
        return CapacityError(
            f"{slots} rows of {capacity} tokens need {total} bytes of KV cache on the GPU, which "
            f"has not that much left ({self._seam.free_bytes()} bytes are free); ask for fewer rows "
            "at once or shorter ones, or lower prefix_cache_slots"
        )


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
