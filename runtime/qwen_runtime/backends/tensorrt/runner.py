"""The TensorRT runner: prompts in chunks, decode steps from CUDA graphs, caches on the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from qwen_runtime.backends.base import FloatArray, IntArray, Limits
from qwen_runtime.backends.device_buffers import (
    ID_BYTES,
    LOGIT_BYTES,
    CallBuffers,
    CallSizes,
    DecodeStaging,
)
from qwen_runtime.backends.device_calls import (
    PrefillCall,
    PrefillRow,
    decode_spans,
    prefill_calls,
)
from qwen_runtime.backends.device_memory import DeviceMemory, aligned
from qwen_runtime.backends.tensorrt.cache import DeviceCache
from qwen_runtime.backends.tensorrt.contexts import Context, Scratch, input_shapes
from qwen_runtime.backends.tensorrt.decoder import Decoder
from qwen_runtime.backends.tensorrt.loaded import LoadedEngine
from qwen_runtime.backends.tensorrt.seam import DeviceInfo, DeviceMemoryError, Seam
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_file import EngineFolder
from qwen_runtime.errors import BackendError, CapacityError

__all__ = ["TensorRtRunner"]


class TensorRtRunner:
    """A `qwen_runtime.backends.base.ModelRunner` on an engine of a bundle.

    Capacity is fixed when an engine is built; slots are added as they are asked for, and given
    back when the runner closes. One stream carries all work; a decode step waits for it once.

    Args:
        bundle: An opened bundle.
        folder: One of its engines.
        seam: TensorRT and CUDA.

    Raises:
        BackendError: If there is no GPU, the engine cannot run on it, or memory is short.
        BundleError: If a plan is damaged or is not what engine.json says.
    """

    def __init__(self, bundle: Bundle, folder: EngineFolder, seam: Seam) -> None:
        self._seam, self._name = seam, str(folder.path)
        self._memory = DeviceMemory(seam)
        self._closed = False
        self._resources = ExitStack()
        self._resources.callback(self._memory.close)
        try:
            self._open(bundle, folder)
        except BaseException:
            self.close()
            raise

    def _open(self, bundle: Bundle, folder: EngineFolder) -> None:
        seam = self._seam
        loaded = LoadedEngine(seam, bundle, folder)
        self._resources.callback(loaded.close)
        self.device: DeviceInfo = loaded.device
        prefill, decode = loaded.phases["prefill"], loaded.phases["decode"]
        self._prefill_plan, self._call_limits = prefill, prefill.limits
        self._decode_limits = decode.limits
        self._limits = Limits(bundle.manifest.model.vocab_size, prefill.limits.capacity)
        self._stream = seam.new_stream()
        self._resources.callback(seam.free_stream, self._stream)
        self._resources.callback(seam.synchronise, self._stream)
        sizes = CallSizes(
            max(prefill.limits.max_batch, decode.limits.max_batch),
            prefill.limits.max_sequence,
            prefill.limits.max_num_logits,
            self._limits.vocab_size,
        )
        # A context wants an address even where an engine needs no scratch memory.
        needed = aligned(max(loaded.scratch_bytes, 1))
        try:
            scratch = Scratch(self._memory.allocate(needed), needed)
            self._buffers = CallBuffers(self._memory, sizes)
        except DeviceMemoryError as error:
            raise BackendError(
                f"{self._name} needs {needed} bytes of scratch memory on the GPU, and "
                f"{sizes.num_bytes} for inputs and logits there and in page-locked memory, got "
                f"{seam.free_bytes()} free ones on the GPU ({error}); build the engine with a "
                "smaller --max-batch or --max-sequence"
            ) from error
        self._cache = DeviceCache(seam, self._memory, self._stream, loaded.layout)
        self._resources.callback(self._cache.clear)
        self._prefill_context = Context(seam, prefill, self._stream, scratch, fixed_shape=False)
        self._resources.callback(self._prefill_context.close)
        self._decoder = Decoder(seam, decode, self._stream, scratch, self._buffers, self._cache)
        self._resources.callback(self._decoder.close)
        # First of all that `close` does: contexts and graphs may be at work.
        self._resources.callback(seam.synchronise, self._stream)
        self._staging: DecodeStaging | None = None

    @property
    def limits(self) -> Limits:
        """Sizes that do not change; a slot holds what the engine's caches have room for."""
        return self._limits

    @property
    def num_slots(self) -> int:
        """Slots allocated now."""
        return self._cache.num_slots

    @property
    def capacity(self) -> int:
        """Tokens a slot can hold: always the engine's."""
        return self._limits.max_context

    @property
    def cache_bytes(self) -> int:
        """Bytes of all cache buffers."""
        return self._cache.num_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device, the weights excluded."""
        return self._memory.device_bytes

    @property
    def num_graphs(self) -> int:
        """CUDA graphs captured now."""
        return self._decoder.num_graphs

    def allocate(self, slots: int, capacity: int) -> None:
        """See `ModelRunner.allocate`. Where memory is short, every slot is as before."""
        self._require_open()
        if capacity > self.capacity:
            raise CapacityError(
                f"a row must have at most {self.capacity} tokens (the capacity of {self._name}), "
                f"got {capacity}; shorten it, or build the engine with a larger --capacity"
            )
        if slots <= self.num_slots:
            return
        self._seam.synchronise(self._stream)
        self._decoder.forget()
        try:
            staging = DecodeStaging(self._memory, slots, self._limits.vocab_size)
        except DeviceMemoryError as error:
            raise CapacityError(
                f"{slots} rows need page-locked memory of the host for their logits, which has "
                "not that much left; ask for fewer rows at once"
            ) from error
        try:
            self._cache.reserve(slots)
        except BaseException:
            staging.close()
            raise
        if self._staging is not None:
            self._staging.close()
        self._staging = staging

    def grow(self, capacity: int) -> None:
        """See `ModelRunner.grow`: an engine's capacity is fixed, so it only refuses."""
        self.allocate(self.num_slots, capacity)

    def copy(self, src: int, dst: int, length: int) -> None:
        """See `ModelRunner.copy`. The copy runs before the next call's work."""
        self._require_open()
        self._cache.copy(src, dst, length)

    def truncate(self, slot: int, length: int) -> None:
        """See `ModelRunner.truncate`. A slot without buffers holds nothing."""
        if slot < self.num_slots:
            self._cache.lengths[slot] = length

    def prefill(
        self,
        slots: Sequence[int],
        tokens: Sequence[IntArray],
        past: Sequence[int],
        want: Sequence[int],
    ) -> list[FloatArray]:
        """See `ModelRunner.prefill`.

        Rows of neighbouring slots share calls, padded to the longest as far as the cache has room;
        long ones run in chunks.
        """
        self._require_open()
        self.grow(max(p + len(t) for p, t in zip(past, tokens, strict=True)))
        columns = zip(slots, past, map(len, tokens), want, strict=True)
        rows = [PrefillRow(index, *row) for index, row in enumerate(columns)]
        parts: list[list[FloatArray]] = [[] for _ in rows]
        for call in prefill_calls(rows, self._call_limits):
            logits = self._run_prefill(call, tokens)
            for values, chunk in zip(logits, call.chunks, strict=True):
                if chunk.wanted:
                    # The memory is written again by the next call.
                    parts[chunk.row.index].append(values[: len(chunk.wanted)].copy())
                self._cache.lengths[chunk.row.slot] = chunk.row.past + chunk.stop
        empty = np.empty((0, self._limits.vocab_size), np.float32)
        return [np.concatenate(each) if each else empty for each in parts]

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """See `ModelRunner.decode`. Spans of slots run one after the other without waiting."""
        self._require_open()
        lengths, staging = self._cache.lengths, self._staging
        if staging is None:
            raise AssertionError("decode before any slot was allocated")
        chosen = np.asarray(slots)
        self.grow(int(lengths[chosen].max()) + 1)
        staging.input_ids[:] = 0
        staging.input_ids[chosen] = tokens
        staging.past_lengths[:] = lengths
        try:
            for first, rows in decode_spans(sorted(slots), lengths, self._decode_limits):
                self._decoder.run(first, rows, staging)
        except DeviceMemoryError as error:
            raise BackendError(
                f"{self._name} has no GPU memory left for a CUDA graph of {len(slots)} rows "
                f"({error}); ask for fewer rows at once, or build the engine with a smaller "
                "--capacity"
            ) from error
        finally:
            # Whatever was queued before a failure is not in the way of what comes next.
            self._seam.synchronise(self._stream)
        lengths[chosen] += 1
        first = int(slots[0])
        if np.array_equal(chosen, np.arange(first, first + len(slots))):
            return staging.logits[first : first + len(slots)]
        return np.asarray(staging.logits[chosen])

    def close(self) -> None:
        """See `ModelRunner.close`; safe to call twice."""
        self._closed = True
        self._staging = None
        self._resources.close()

    def _run_prefill(self, call: PrefillCall, tokens: Sequence[IntArray]) -> FloatArray:
        """Run one call; returns logits [rows, num_logits, V], valid until the next call."""
        rows, sequence, num_logits = len(call.chunks), call.sequence, call.num_logits
        buffers, seam, stream = self._buffers, self._seam, self._stream
        input_ids, past_lengths, indices = buffers.host_inputs(rows, sequence, num_logits)
        input_ids[:] = 0
        indices[:] = 0
        for row, chunk in enumerate(call.chunks):
            input_ids[row, : chunk.length] = tokens[chunk.row.index][chunk.start : chunk.stop]
            past_lengths[row] = chunk.past
            indices[row, : len(chunk.wanted)] = chunk.wanted
        targets = (buffers.input_ids, buffers.past_lengths, buffers.logits_indices)
        counts = (rows * sequence, rows, rows * num_logits)
        for target, source, count in zip(targets, buffers.host_addresses, counts, strict=True):
            seam.to_device(target, source, count * ID_BYTES, stream)
        self._prefill_context.bind(
            input_shapes(self._prefill_plan, rows, sequence, num_logits),
            [
                ("input_ids", buffers.input_ids),
                ("past_lengths", buffers.past_lengths),
                ("logits_indices", buffers.logits_indices),
                ("logits", buffers.logits),
                *self._cache.addresses(call.first_slot),
            ],
        )
        self._prefill_context.enqueue()
        if any(chunk.wanted for chunk in call.chunks):
            size = rows * num_logits * self._limits.vocab_size * LOGIT_BYTES
            seam.to_host(buffers.host_logits_address, buffers.logits, size, stream)
        # The next call's inputs are staged where these are read from.
        seam.synchronise(stream)
        return buffers.host_logits(rows, num_logits)

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError("the runner is closed; open the bundle again")
