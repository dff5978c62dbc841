"""A call's inputs and outputs, bound to fixed memory of the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.cuda.cache import DeviceKVCache
from qwen_runtime.backends.cuda.choices import DeviceChoices
from qwen_runtime.backends.cuda.dlpack import ONNX_TYPES
from qwen_runtime.backends.cuda.sessions import LoweredGraph
from qwen_runtime.backends.device_buffers import CallBuffers

__all__ = ["CallBinder"]


class CallBinder:
    """Binds calls of either graph.

    Args:
        device_type: ONNX Runtime's name of the device.
        buffers: Device inputs and logits.
        cache: The caches; past and present of each are bound to the same memory.
        choices: Where tokens go that the device chooses; None where the graph chooses none.
        cache_shape: Heads and head_dim.
        cache_type: Element type of the caches, by ONNX's name.
        vocab_size: Logits of a position.
    """

    def __init__(
        self,
        device_type: str,
        buffers: CallBuffers,
        cache: DeviceKVCache,
        choices: DeviceChoices | None,
        *,
        cache_shape: tuple[int, int],
        cache_type: str,
        vocab_size: int,
    ) -> None:
        self._device, self._buffers, self._cache, self._choices = (
            device_type,
            buffers,
            cache,
            choices,
        )
        self._cache_shape, self._cache_type = cache_shape, cache_type
        self._vocab_size = vocab_size
        self._totals: dict[LoweredGraph, npt.NDArray[np.int32]] = {}
        """Memory of the host that each graph's bindings point to."""

    def bind(
        self,
        graph: LoweredGraph,
        first: int,
        rows: int,
        sequence: int,
        num_logits: int,
        total: int,
    ) -> Any:
        """Bind a call.

        Args:
            graph: What runs.
            first: Slot of the first row.
            rows: Rows.
            sequence: New tokens per row.
            num_logits: Positions per row whose logits come back.
            total: Tokens of the longest row, the new ones included; a captured graph keeps it, so
                decode is given the capacity.

        Returns:
            An onnxruntime.IOBinding.
        """
        buffers = self._buffers
        binding = graph.session.io_binding()
        inputs = {
            "input_ids": ((rows, sequence), buffers.input_ids),
            "past_lengths": ((rows,), buffers.past_lengths),
            "logits_indices": (
                (rows, num_logits),
                buffers.decode_indices if sequence == 1 == num_logits else buffers.logits_indices,
            ),
        }
        for name, (shape, address) in inputs.items():
            if graph.has(name):
                binding.bind_input(name, self._device, 0, ONNX_TYPES["int64"], shape, address)
        if graph.has("total_sequence_length"):
            # Read by the host when the call is queued, also on a GPU.
            value = self._totals.setdefault(graph, np.zeros(1, np.int32))
            value[0] = total
            kind, address = ONNX_TYPES["int32"], value.ctypes.data
            binding.bind_input("total_sequence_length", "cpu", 0, kind, (1,), address)
        heads, head_dim = self._cache_shape
        shape = (rows, heads, self._cache.capacity, head_dim)
        kind = ONNX_TYPES[self._cache_type]
        for name, address in self._cache.addresses(first):
            binding.bind_input(f"past_key_values.{name}", self._device, 0, kind, shape, address)
            binding.bind_output(f"present.{name}", self._device, 0, kind, shape, address)
        logits = (rows, num_logits, self._vocab_size)
        binding.bind_output("logits", self._device, 0, ONNX_TYPES["float"], logits, buffers.logits)
        if self._choices is not None and graph.has("next_tokens"):
            kind = ONNX_TYPES["int64"]
            place = self._choices.chosen.device
            binding.bind_output("next_tokens", self._device, 0, kind, (rows,), place)
        return binding
