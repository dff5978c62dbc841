"""Decode steps: plain at first, from a CUDA graph where they come again.

A step of one span of slots is always the same work at the same addresses: new ids and lengths to
the device, the engine, logits back. A graph holds all of it and starts with one launch, where a
plain step costs a launch for each of its kernels.

NVIDIA's advice is one execution context for each captured graph, with shared scratch memory, since
a context keeps state that belongs to its shapes. So a span has a context of its own once it is
captured; a span seen for the first time runs in one that all of those share.

Source: TensorRT-RTX documentation, Optimizing Performance, Limitations of CUDA Graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from qwen_runtime.backends.device_buffers import ID_BYTES, CallBuffers, DecodeStaging
from qwen_runtime.backends.tensorrt.cache import DeviceCache
from qwen_runtime.backends.tensorrt.contexts import Context, Scratch, input_shapes
from qwen_runtime.backends.tensorrt.loaded import PhasePlan
from qwen_runtime.backends.tensorrt.seam import Seam

__all__ = ["MAX_GRAPHS", "Decoder"]

MAX_GRAPHS = 16
"""Graphs kept; the one that was not used for longest goes. Each keeps a context."""
SEEN_SPANS = 4 * MAX_GRAPHS
"""Spans remembered as seen once."""


@dataclass(slots=True)
class _Captured:
    """A graph and the context it was captured in."""

    context: Context
    graph: int


class Decoder:
    """Runs decode steps of spans of slots.

    Args:
        seam: TensorRT and CUDA.
        plan: What runs them.
        stream: What they run on.
        scratch: Shared by all contexts.
        buffers: Device inputs and logits.
        cache: Whose slots they are; when its buffers move, `forget` must have been called.
    """

    def __init__(
        self,
        seam: Seam,
        plan: PhasePlan,
        stream: int,
        scratch: Scratch,
        buffers: CallBuffers,
        cache: DeviceCache,
    ) -> None:
        self._seam, self._plan, self._stream = seam, plan, stream
        self._scratch, self._buffers, self._cache = scratch, buffers, cache
        self._captured: OrderedDict[tuple[int, int], _Captured] = OrderedDict()
        self._seen: OrderedDict[tuple[int, int], None] = OrderedDict()
        if plan.has("logits_indices"):
            # One token a row, so its logits are always those at position 0.
            size = plan.limits.max_batch * ID_BYTES
            seam.zero(buffers.decode_indices, size, stream)
        self._shared = self._new_context()

    @property
    def num_graphs(self) -> int:
        """Graphs captured now."""
        return len(self._captured)

    def run(self, first: int, rows: int, staging: DecodeStaging) -> None:
        """Queue a step of slots first..first+rows-1, whose inputs are staged.

        The logits are in the staging area when the stream is synchronised.
        """
        key = (first, rows)
        captured = self._captured.get(key)
        if captured is not None:
            self._captured.move_to_end(key)
            self._seam.launch(captured.graph, self._stream)
        elif key not in self._seen or not self._shared.capturable:
            self._seen[key] = None
            while len(self._seen) > SEEN_SPANS:
                self._seen.popitem(last=False)
            self._bind(self._shared, first, rows)
            self._step(self._shared, first, rows, staging)
        else:
            self._run_and_capture(first, rows, staging)

    def forget(self) -> None:
        """Destroy all graphs: addresses in them are about to change. Nothing may be pending."""
        while self._captured:
            self._drop(self._captured.popitem()[1])

    def close(self) -> None:
        """Destroy graphs and contexts."""
        self.forget()
        self._shared.close()

    def _run_and_capture(self, first: int, rows: int, staging: DecodeStaging) -> None:
        if len(self._captured) >= MAX_GRAPHS:
            # It may still be running, for another span of the same step.
            self._seam.synchronise(self._stream)
            self._drop(self._captured.popitem(last=False)[1])
        context = self._new_context()
        try:
            self._bind(context, first, rows)
            # New shapes take effect in the first run, which must not be the captured one.
            self._step(context, first, rows, staging)
            self._seam.begin_capture(self._stream)
            try:
                self._step(context, first, rows, staging)
            except BaseException:
                self._seam.abort_capture(self._stream)
                raise
            graph = self._seam.end_capture(self._stream)
        except BaseException:
            self._seam.synchronise(self._stream)
            context.close()
            raise
        self._captured[first, rows] = _Captured(context, graph)

    def _new_context(self) -> Context:
        return Context(self._seam, self._plan, self._stream, self._scratch, fixed_shape=True)

    def _bind(self, context: Context, first: int, rows: int) -> None:
        buffers = self._buffers
        addresses = [
            ("input_ids", buffers.input_ids),
            ("past_lengths", buffers.past_lengths),
            ("logits", buffers.logits),
            *self._cache.addresses(first),
        ]
        if self._plan.has("logits_indices"):
            addresses.append(("logits_indices", buffers.decode_indices))
        context.bind(input_shapes(self._plan, rows, 1, 1), addresses)

    def _step(self, context: Context, first: int, rows: int, staging: DecodeStaging) -> None:
        seam, stream, buffers = self._seam, self._stream, self._buffers
        input_ids, past_lengths, logits = staging.addresses(first)
        seam.to_device(buffers.input_ids, input_ids, rows * ID_BYTES, stream)
        seam.to_device(buffers.past_lengths, past_lengths, rows * ID_BYTES, stream)
        context.enqueue()
        seam.to_host(logits, buffers.logits, rows * staging.logits_bytes, stream)

    def _drop(self, captured: _Captured) -> None:
        self._seam.free_graph(captured.graph)
        captured.context.close()
