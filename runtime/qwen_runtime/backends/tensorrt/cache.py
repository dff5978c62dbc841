"""KV caches on the device: one buffer for each layer's keys and one for its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qwen_runtime.backends.base import IntArray
from qwen_runtime.backends.device_memory import ALIGNMENT, DeviceMemory
from qwen_runtime.backends.tensorrt.seam import DeviceMemoryError, Seam
from qwen_runtime.errors import BackendError, CapacityError

__all__ = ["CacheLayout", "DeviceCache"]


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """One buffer: [slots, heads, capacity, head_dim]."""

    outputs: Mapping[str, str]
    """Graph inputs, one for each buffer, to the outputs that are written in place."""
    heads: int
    capacity: int
    """Tokens a slot has room for, fixed when the engine was built."""
    token_bytes: int
    """head_dim elements of the engine's type."""

    @property
    def head_bytes(self) -> int:
        """All tokens of one head."""
        return self.capacity * self.token_bytes

    @property
    def slot_bytes(self) -> int:
        """One slot of one buffer."""
        return self.heads * self.head_bytes


class DeviceCache:
    """The buffers and what each slot holds.

    Buffers only grow: one after the other, so that growing takes one buffer more, not all. Where
    memory ends half-way, those that have grown stay; every slot is still whole.

    Args:
        seam: TensorRT and CUDA.
        memory: Where buffers are allocated; they are freed with it.
        stream: What copies run on.
        layout: Of every buffer.

    Raises:
        BackendError: If slots would not begin at addresses that TensorRT takes.
    """

    def __init__(self, seam: Seam, memory: DeviceMemory, stream: int, layout: CacheLayout) -> None:
        if layout.slot_bytes % ALIGNMENT:
            raise BackendError(
                f"a cache slot must take a multiple of {ALIGNMENT} bytes, got {layout.slot_bytes} "
                f"for a capacity of {layout.capacity}; build the engine with a --capacity that is "
                f"a multiple of {ALIGNMENT}"
            )
        self._seam, self._memory, self._stream, self._layout = seam, memory, stream, layout
        self._buffers: dict[str, int] = {}
        self._slots: dict[str, int] = {}
        self._lengths = np.zeros(0, np.int64)

    @property
    def lengths(self) -> IntArray:
        """Tokens in each slot, [slots]; the array itself, not a copy."""
        return self._lengths

    @property
    def num_slots(self) -> int:
        """Slots that every buffer has."""
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self._slots.values()) * self._layout.slot_bytes

    def addresses(self, first: int) -> Iterator[tuple[str, int]]:
        """Every cache input and output with the address of slot ``first``."""
        for name, output in self._layout.outputs.items():
            address = self._buffers[name] + first * self._layout.slot_bytes
            yield name, address
            yield output, address

    def reserve(self, slots: int) -> None:
        """Make room for so many slots, keeping contents; buffers may move.

        Raises:
            CapacityError: If there is not enough memory; every slot is as before then.
        """
        if slots <= self.num_slots:
            return
        for name in self._layout.outputs:
            if self._slots.get(name, 0) < slots:
                self._replace(name, slots)
        lengths = np.zeros(slots, np.int64)
        lengths[: self.num_slots] = self._lengths
        self._lengths = lengths

    def _replace(self, name: str, slots: int) -> None:
        size = slots * self._layout.slot_bytes
        try:
            new = self._memory.allocate(size)
        except DeviceMemoryError as error:
            total = size * len(self._layout.outputs)
            raise CapacityError(
                f"{slots} rows of {self._layout.capacity} tokens need {total} bytes of KV cache "
                f"on the GPU, which has not that much left ({self._seam.free_bytes()} bytes are "
                "free); ask for fewer rows at once, lower prefix_cache_slots, or build the engine "
                "with a smaller --capacity"
            ) from error
        # Masked positions are multiplied by zero, and what was there before could be a NaN.
        self._seam.zero(new, size, self._stream)
        old = self._buffers.get(name)
        if old is not None:
            held = self.num_slots * self._layout.slot_bytes
            if held:
                self._seam.on_device(new, old, held, self._stream)
        self._seam.synchronise(self._stream)
        if old is not None:
            self._memory.free(old)
        self._buffers[name], self._slots[name] = new, slots

    def copy(self, src: int, dst: int, length: int) -> None:
        """Make slot ``dst`` hold the first ``length`` tokens of slot ``src``.

        The copy is done before whatever the stream is given next.
        """
        layout = self._layout
        if src != dst and length:
            for buffer in self._buffers.values():
                self._seam.on_device_2d(
                    buffer + dst * layout.slot_bytes,
                    buffer + src * layout.slot_bytes,
                    pitch=layout.head_bytes,
                    width=length * layout.token_bytes,
                    height=layout.heads,
                    stream=self._stream,
                )
        self._lengths[dst] = length

    def clear(self) -> None:
        """Free the buffers."""
        for address in self._buffers.values():
            self._memory.free(address)
        self._buffers.clear()
        self._slots.clear()
        self._lengths = np.zeros(0, np.int64)
