"""Decode steps: plain at first, from a CUDA graph where they come again.

A step of one block of slots is always the same work at the same addresses: new ids and lengths to
the device, the graph, results back. ONNX Runtime keeps a CUDA graph for every number it is given
and launches it whatever is bound by then, so a number stands for one binding for good and is never
given again: when a buffer moves, bindings and numbers go.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from qwen_runtime.backends.cuda.bindings import CallBinder
from qwen_runtime.backends.cuda.cache import DeviceKVCache
from qwen_runtime.backends.cuda.choices import DeviceChoices
from qwen_runtime.backends.cuda.seam import NO_GRAPH, CudaSeam
from qwen_runtime.backends.cuda.sessions import LoweredGraph
from qwen_runtime.backends.device_buffers import ID_BYTES, CallBuffers, DecodeStaging

__all__ = ["MAX_BINDINGS", "Bring", "Decoder"]

Bring = Literal["logits", "token", "top", "nothing"]
"""What a step brings of each row: all logits, the best token, that and the highest logits."""

MAX_BINDINGS = 64
"""Blocks of slots whose bindings and graphs are kept; the one not used for longest goes."""


@dataclass(slots=True)
class _Block:
    """A block of slots that was run."""

    binding: Any
    graph: int
    """Its number; it is captured in the second run."""
    runs: int = 0


class Decoder:
    """Runs decode steps of blocks of slots.

    Args:
        seam: CUDA and ONNX Runtime.
        graph: The decode graph.
        stream: What it runs on.
        buffers: Device inputs and logits.
        cache: Whose slots they are; when its buffers move, `forget` must have been called.
        binder: Binds a call.
        choices: What the device chooses out of logits; None where the graph chooses nothing.
    """

    def __init__(
        self,
        seam: CudaSeam,
        graph: LoweredGraph,
        stream: int,
        buffers: CallBuffers,
        cache: DeviceKVCache,
        binder: CallBinder,
        choices: DeviceChoices | None,
    ) -> None:
        self._seam, self._graph, self._stream = seam, graph, stream
        self._buffers, self._cache, self._binder = buffers, cache, binder
        self._choices = choices
        self._blocks: OrderedDict[tuple[int, int], _Block] = OrderedDict()
        self._numbers = count(1)

    @property
    def num_graphs(self) -> int:
        """CUDA graphs captured now."""
        return sum(block.runs > 1 for block in self._blocks.values())

    def run(self, first: int, rows: int, staging: DecodeStaging, bring: Bring) -> None:
        """Queue a step of slots first..first+rows-1, whose inputs are staged.

        Args:
            first: The first slot.
            rows: How many.
            staging: Inputs; the logits are there when the stream is synchronised.
            bring: What is brought to the host.
        """
        block = self._block(first, rows)
        seam, stream, buffers = self._seam, self._stream, self._buffers
        input_ids, past_lengths, logits = staging.addresses(first)
        seam.to_device(buffers.input_ids, input_ids, rows * ID_BYTES, stream)
        seam.to_device(buffers.past_lengths, past_lengths, rows * ID_BYTES, stream)
        # A block met once may never come again, and capturing costs several steps.
        number = block.graph if block.runs else NO_GRAPH
        try:
            seam.run(self._graph.session, block.binding, stream, number)
        except BaseException:
            if block.runs == 1:
                # What was captured of it is not known, so its number is spent.
                block.graph, block.runs = next(self._numbers), 0
            raise
        block.runs += 1
        if bring == "logits":
            seam.to_host(logits, buffers.logits, rows * staging.logits_bytes, stream)
        elif bring != "nothing":
            assert self._choices is not None, "asked for only where the graph chooses tokens"
            self._choices.bring(first, rows, top=bring == "top")

    def bring_logits(
        self, slots: Sequence[int], blocks: Sequence[tuple[int, int]], staging: DecodeStaging
    ) -> None:
        """Queue the way of some slots' logits to the host, after a step that brought others.

        The device still holds those of the block that ran last; another block runs once more, with
        the same inputs at the same places.

        Args:
            slots: Whose logits; where they are when the stream is synchronised.
            blocks: The step's blocks, as (first slot, slots), in the order they were run.
            staging: The step's.
        """
        left = set(slots)
        for block in reversed(blocks):
            first, rows = block
            wanted = left.intersection(range(first, first + rows))
            if wanted and block != blocks[-1]:
                self.run(first, rows, staging, "nothing")
            for slot in wanted:
                source = self._buffers.logits + (slot - first) * staging.logits_bytes
                target = staging.addresses(slot)[2]
                self._seam.to_host(target, source, staging.logits_bytes, self._stream)
            left -= wanted

    def forget(self) -> None:
        """Destroy all bindings and graphs: addresses in them are about to change.

        Nothing may be pending.
        """
        while self._blocks:
            self._drop(self._blocks.popitem()[1])

    def _block(self, first: int, rows: int) -> _Block:
        key = (first, rows)
        block = self._blocks.get(key)
        if block is None:
            if len(self._blocks) >= MAX_BINDINGS:
                # It may still be running, for another block of the same step.
                self._seam.synchronise(self._stream)
                self._drop(self._blocks.popitem(last=False)[1])
            # A graph keeps what the host reads when it is captured: the longest row there can be.
            total = self._cache.capacity
            binding = self._binder.bind(self._graph, first, rows, 1, 1, total)
            block = self._blocks[key] = _Block(binding, next(self._numbers))
        self._blocks.move_to_end(key)
        return block

    def _drop(self, block: _Block) -> None:
        if block.runs > 1:
            self._seam.release_graph(self._graph.session, block.graph)
