"""What the device chooses out of a step's logits, so that not all of them cross to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_runtime.backends.base import FloatArray, IntArray, TopLogits
from qwen_runtime.backends.cuda.dlpack import ONNX_TYPES
from qwen_runtime.backends.cuda.seam import NO_GRAPH, CudaSeam
from qwen_runtime.backends.cuda.sessions import LoweredGraph
from qwen_runtime.backends.device_buffers import ID_BYTES, LOGIT_BYTES, CallSizes
from qwen_runtime.backends.device_memory import DeviceMemory
from qwen_runtime.errors import BackendError

__all__ = ["ChosenTokens", "DeviceChoices"]


class DeviceChoices:
    """The tokens that a decode graph chooses, and the highest logits that are found besides.

    Args:
        seam: CUDA and ONNX Runtime.
        top_graph: The graph ``top_logits``; None where there is none.
        stream: What it runs on.
        memory: Where results are allocated; they are freed with it.
        logits: Where decode calls leave theirs.
        sizes: The largest call.
        name: What messages call the graphs.
    """

    def __init__(
        self,
        seam: CudaSeam,
        top_graph: LoweredGraph | None,
        stream: int,
        memory: DeviceMemory,
        logits: int,
        sizes: CallSizes,
        name: str,
    ) -> None:
        self.chosen = ChosenTokens(memory, sizes.rows)
        self._search: _Search | None = None
        if top_graph is not None:
            self._search = _Search(seam, top_graph, stream, memory, logits, sizes)
        self._seam, self._stream = seam, stream
        self._vocab_size, self._name = sizes.vocab_size, name

    @property
    def num_top(self) -> int:
        """How many of a row's logits can be brought; 0 for none but all."""
        return 0 if self._search is None else self._search.count

    def reserve(self, slots: int) -> None:
        """Make room for the results of so many slots; those brought before are void."""
        self.chosen.reserve(slots)
        if self._search is not None:
            self._search.reserve(slots)

    def bring(self, first: int, rows: int, *, top: bool) -> None:
        """Queue the way of a decode call's results to the host.

        Args:
            first: The call's first slot.
            rows: Its rows.
            top: Whether the highest logits are wanted beside the best token.
        """
        address = self.chosen.address(first)
        self._seam.to_host(address, self.chosen.device, rows * ID_BYTES, self._stream)
        if top:
            assert self._search is not None, "asked for only where num_top is above 0"
            self._search.run(first, rows)

    def best(self, slots: Sequence[int]) -> IntArray:
        """The best token of each of some slots of the last step, [len(slots)].

        Raises:
            BackendError: If a row's logits hold a NaN.
        """
        best = self.chosen.tokens[np.asarray(slots)]
        if (best >= self._vocab_size).any():
            raise BackendError(
                f"{self._name}: logits must be numbers, got a NaN; check the weights, or make the "
                "graphs again with --compute-dtype bf16, which has float32's range"
            )
        return np.asarray(best)

    def top(self, slots: Sequence[int]) -> TopLogits:
        """What is highest of each of some slots of the last step.

        Raises:
            BackendError: If a row's logits hold a NaN.
        """
        assert self._search is not None, "asked for only where num_top is above 0"
        rows = np.asarray(slots)
        return TopLogits(self.best(slots), self._search.logits[rows], self._search.tokens[rows])

    def close(self) -> None:
        """Let go of the session; nothing may be pending."""
        if self._search is not None:
            self._search.close()


class ChosenTokens:
    """Where the device leaves each row's best token, and where the host finds them.

    Args:
        memory: Where they are allocated; they are freed with it.
        rows: Rows of the largest call.
    """

    def __init__(self, memory: DeviceMemory, rows: int) -> None:
        self.device = memory.allocate(rows * ID_BYTES)
        """Of the rows of one call."""
        self._host = _HostRows(memory, ID_BYTES)

    def reserve(self, slots: int) -> None:
        """Make room for the tokens of so many slots; those brought before are void."""
        self._host.reserve(slots)

    def address(self, slot: int) -> int:
        """Where the host finds the tokens of slots from ``slot`` on."""
        return self._host.address(slot)

    @property
    def tokens(self) -> IntArray:
        """The token of each slot that the last step brought, [slots]; a view."""
        return self._host.view(np.dtype(np.int64))[:, 0].view(np.int64)


class _Search:
    """Finds the highest logits of the rows of a decode call, after it and on the same stream.

    It is not captured: one node, whose buffers belong to no cache.

    Args:
        seam: CUDA and ONNX Runtime.
        graph: The graph ``top_logits``.
        stream: What it runs on.
        memory: Where its results are allocated; they are freed with it.
        logits: Where decode calls leave theirs.
        sizes: The largest call.
    """

    def __init__(
        self,
        seam: CudaSeam,
        graph: LoweredGraph,
        stream: int,
        memory: DeviceMemory,
        logits: int,
        sizes: CallSizes,
    ) -> None:
        self._seam, self._graph, self._stream = seam, graph, stream
        self._source, self._vocab_size = logits, sizes.vocab_size
        self.count = graph.num_top
        """How many of each row."""
        self._device_logits = memory.allocate(sizes.rows * self.count * LOGIT_BYTES)
        self._device_tokens = memory.allocate(sizes.rows * self.count * ID_BYTES)
        self._host_logits = _HostRows(memory, self.count * LOGIT_BYTES)
        self._host_tokens = _HostRows(memory, self.count * ID_BYTES)
        self._bindings: dict[int, Any] = {}

    def reserve(self, slots: int) -> None:
        """Make room for the results of so many slots; those brought before are void."""
        self._host_logits.reserve(slots)
        self._host_tokens.reserve(slots)

    def run(self, first: int, rows: int) -> None:
        """Queue the search in the logits of a call, and the results' way to the host.

        Args:
            first: The call's first slot.
            rows: Its rows.
        """
        if rows not in self._bindings:
            self._bindings[rows] = self._bind(rows)
        seam, stream = self._seam, self._stream
        seam.run(self._graph.session, self._bindings[rows], stream, NO_GRAPH)
        for source, host in (
            (self._device_logits, self._host_logits),
            (self._device_tokens, self._host_tokens),
        ):
            seam.to_host(host.address(first), source, rows * host.row_bytes, stream)

    @property
    def logits(self) -> FloatArray:
        """The highest logits of each slot that the last step brought, [slots, count]; a view."""
        return self._host_logits.view(np.dtype(np.float32)).view(np.float32)

    @property
    def tokens(self) -> IntArray:
        """Their token ids, [slots, count]; a view."""
        return self._host_tokens.view(np.dtype(np.int64)).view(np.int64)

    def close(self) -> None:
        """Let go of the session; nothing may be pending."""
        self._bindings.clear()

    def _bind(self, rows: int) -> Any:
        device = self._seam.device_type
        binding = self._graph.session.io_binding()
        floats, ids = ONNX_TYPES["float"], ONNX_TYPES["int64"]
        binding.bind_input("logits", device, 0, floats, (rows, self._vocab_size), self._source)
        shape = (rows, self.count)
        binding.bind_output("top_logits", device, 0, floats, shape, self._device_logits)
        binding.bind_output("top_tokens", device, 0, ids, shape, self._device_tokens)
        return binding


class _HostRows:
    """Page-locked memory of equally many bytes a slot, that grows.

    Args:
        memory: Where it is allocated; it is freed with it.
        row_bytes: Bytes of a slot.
    """

    def __init__(self, memory: DeviceMemory, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._memory = memory
        self._start, self._slots = 0, 0

    def reserve(self, slots: int) -> None:
        """Make room for so many slots; what was there is void."""
        if slots > self._slots:
            start = self._memory.allocate_host(slots * self.row_bytes)
            if self._slots:
                self._memory.free_host(self._start)
            self._start, self._slots = start, slots

    def address(self, slot: int) -> int:
        """Of a slot; the next ones follow."""
        return self._start + slot * self.row_bytes

    def view(self, dtype: np.dtype[np.generic]) -> np.ndarray[Any, np.dtype[np.generic]]:
        """All of it, [slots, elements]; a view."""
        shape = (self._slots, self.row_bytes // dtype.itemsize)
        return self._memory.view(self._start, shape, dtype)
