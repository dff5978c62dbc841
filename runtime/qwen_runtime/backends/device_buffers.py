"""Inputs and logits of a call: fixed device buffers, fed from page-locked memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.base import FloatArray, IntArray
from qwen_runtime.backends.device_memory import DeviceMemory, aligned

__all__ = ["ID_BYTES", "LOGIT_BYTES", "CallBuffers", "CallSizes", "DecodeStaging"]

ID_BYTES = np.dtype(np.int64).itemsize
LOGIT_BYTES = np.dtype(np.float32).itemsize


@dataclass(frozen=True, slots=True)
class CallSizes:
    """The largest call."""

    rows: int
    sequence: int
    """New tokens per row."""
    num_logits: int
    """Positions per row whose logits come back."""
    vocab_size: int

    @property
    def input_bytes(self) -> tuple[int, int, int]:
        """Of input_ids, past_lengths and logits_indices."""
        counts = (self.rows * self.sequence, self.rows, self.rows * self.num_logits)
        return counts[0] * ID_BYTES, counts[1] * ID_BYTES, counts[2] * ID_BYTES

    @property
    def logits_bytes(self) -> int:
        """Of all logits."""
        return self.rows * self.num_logits * self.vocab_size * LOGIT_BYTES

    @property
    def num_bytes(self) -> int:
        """Of inputs and logits."""
        return sum(self.input_bytes) + self.logits_bytes


class CallBuffers:
    """Buffers of one call at a time; prefill and decode share those on the device.

    Args:
        memory: Where they are allocated; they are freed with it.
        sizes: The largest call.

    Raises:
        DeviceMemoryError: If there is not enough memory.
    """

    def __init__(self, memory: DeviceMemory, sizes: CallSizes) -> None:
        offsets = np.cumsum([0, *map(aligned, sizes.input_bytes)]).tolist()
        device = memory.allocate(offsets[-1] + aligned(sizes.rows * ID_BYTES))
        self.input_ids, self.past_lengths, self.logits_indices, self.decode_indices = (
            device + offset for offset in offsets
        )
        self.logits = memory.allocate(sizes.logits_bytes)
        host = memory.allocate_host(offsets[-1])
        self.host_logits_address = memory.allocate_host(sizes.logits_bytes)
        self._host = tuple(host + offset for offset in offsets[:3])
        self._memory, self._vocab_size = memory, sizes.vocab_size

    @property
    def host_addresses(self) -> tuple[int, int, int]:
        """Where input_ids, past_lengths and logits_indices are staged."""
        return self._host[0], self._host[1], self._host[2]

    def host_inputs(
        self, rows: int, sequence: int, num_logits: int
    ) -> tuple[IntArray, IntArray, IntArray]:
        """The staged inputs of a call: [rows, sequence], [rows], [rows, num_logits]; views."""
        shapes = ((rows, sequence), (rows,), (rows, num_logits))
        views = [
            self._memory.view(address, shape, np.int64)
            for address, shape in zip(self._host, shapes, strict=True)
        ]
        return _ids(views[0]), _ids(views[1]), _ids(views[2])

    def host_logits(self, rows: int, num_logits: int) -> FloatArray:
        """The logits that a call has brought, [rows, num_logits, V]; a view."""
        shape = (rows, num_logits, self._vocab_size)
        return _floats(self._memory.view(self.host_logits_address, shape, np.float32))


class DecodeStaging:
    """Page-locked memory of decode steps, one entry a slot.

    By slot and not by row, so that several calls of one step need not wait for each other.

    Args:
        memory: Where it is allocated.
        slots: Entries.
        vocab_size: Logits of one.

    Raises:
        DeviceMemoryError: If there is not enough memory.
    """

    def __init__(self, memory: DeviceMemory, slots: int, vocab_size: int) -> None:
        self._memory = memory
        self.logits_bytes = vocab_size * LOGIT_BYTES
        """Bytes of one slot's logits."""
        inputs = slots * ID_BYTES
        self._address = memory.allocate_host(2 * inputs)
        try:
            self._logits = memory.allocate_host(slots * self.logits_bytes)
        except BaseException:
            memory.free_host(self._address)
            raise
        self.input_ids = _ids(memory.view(self._address, (slots,), np.int64))
        """The new token of each slot, [slots]."""
        self.past_lengths = _ids(memory.view(self._address + inputs, (slots,), np.int64))
        """Tokens each slot holds, [slots]."""
        self.logits = _floats(memory.view(self._logits, (slots, vocab_size), np.float32))
        """What the last step brought, [slots, V]."""
        self._past = self._address + inputs

    def addresses(self, slot: int) -> tuple[int, int, int]:
        """Where input_ids, past_lengths and logits of slots from ``slot`` on lie."""
        offset = slot * ID_BYTES
        return self._address + offset, self._past + offset, self._logits + slot * self.logits_bytes

    def close(self) -> None:
        """Free it; its arrays are void."""
        self._memory.free_host(self._logits)
        self._memory.free_host(self._address)


def _ids(array: npt.NDArray[np.generic]) -> IntArray:
    return array.view(np.int64)


def _floats(array: npt.NDArray[np.generic]) -> FloatArray:
    return array.view(np.float32)
