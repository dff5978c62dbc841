"""The CUDA runner: prompts in chunks, decode steps from CUDA graphs, caches on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from qwen_runtime.backends.base import FloatArray, IntArray, Limits, TopLogits
from qwen_runtime.backends.cuda.bindings import CallBinder
from qwen_runtime.backends.cuda.blocks import BLOCK_SIZES, block_around
from qwen_runtime.backends.cuda.cache import DeviceKVCache
from qwen_runtime.backends.cuda.choices import DeviceChoices
from qwen_runtime.backends.cuda.decoder import Bring, Decoder
from qwen_runtime.backends.cuda.dlpack import ELEMENT_BYTES
from qwen_runtime.backends.cuda.seam import NO_GRAPH, CudaSeam
from qwen_runtime.backends.cuda.sessions import CACHE_TYPES, LoweredGraph
from qwen_runtime.backends.cuda.weights import DeviceWeights
from qwen_runtime.backends.device_buffers import (
    ID_BYTES,
    LOGIT_BYTES,
    CallBuffers,
    CallSizes,
    DecodeStaging,
)
from qwen_runtime.backends.device_calls import (
    CallLimits,
    PrefillCall,
    PrefillRow,
    decode_spans,
    prefill_calls,
)
from qwen_runtime.backends.device_check import require_gpu
from qwen_runtime.backends.device_memory import DeviceMemory
from qwen_runtime.backends.device_seam import DeviceInfo, DeviceMemoryError
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError, CapacityError
from qwen_runtime.lowered_description import GraphName
from qwen_runtime.lowered_file import LoweredFolder

__all__ = ["CudaRunner"]

MAX_CALL_TOKENS = 2048
"""New tokens of one call, over all its rows: bounds activation memory; prompts of that length were
measured at full speed."""
MAX_CALL_LOGITS = 64
"""Positions of one call whose logits come back: 600 kB each with Qwen's vocabulary."""
_FIRST_BF16_SM = 80


class CudaRunner:
    """A `qwen_runtime.backends.base.ModelRunner` on ONNX Runtime's CUDA provider.

    Weights and caches are on the device once, for both graphs; one stream carries all work, and a
    decode step waits for it once.

    Attributes:
        num_top_rows: Rows whose highest logits were brought by themselves.
        num_whole_rows: How many of them were asked for whole after all.

    Args:
        bundle: An opened bundle.
        folder: Its graphs lowered for CUDA.
        seam: CUDA and ONNX Runtime.

    Raises:
        BackendError: If there is no GPU, ONNX Runtime cannot run the graphs on it, or memory is
            short.
        BundleError: If the graphs are not what lowered.json says.
    """

    def __init__(self, bundle: Bundle, folder: LoweredFolder, seam: CudaSeam) -> None:
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

    def _open(self, bundle: Bundle, folder: LoweredFolder) -> None:
        seam, model, found = self._seam, bundle.manifest.model, folder.description
        purpose = "run a bundle with device='cuda'"
        self.device: DeviceInfo = require_gpu(seam, purpose, "use device='cpu'")
        if found.compute_dtype == "bf16" and self.device.sm < _FIRST_BF16_SM:
            raise BackendError(
                f"{self._name} computes in bf16, which takes a GPU of SM {_FIRST_BF16_SM} or newer, "
                f"got SM {self.device.sm}; make the graphs again with --compute-dtype fp16"
            )
        cache_type = CACHE_TYPES[found.compute_dtype]
        heads, head_dim = model.num_key_value_heads, model.head_dim
        token_bytes = head_dim * ELEMENT_BYTES[cache_type]
        self._limits = Limits(model.vocab_size, bundle.manifest.max_context)
        # Rows of a group-query call must begin at 0 and be equally long; unequal rows would be
        # padded for the other form too, and then a row's numbers depend on its neighbours.
        self._call_limits = CallLimits(
            capacity=bundle.manifest.max_context,
            max_batch=BLOCK_SIZES[-1],
            max_sequence=MAX_CALL_TOKENS,
            max_num_logits=MAX_CALL_LOGITS,
            max_tokens=MAX_CALL_TOKENS,
            max_logits=MAX_CALL_LOGITS,
            uniform=True,
        )
        self._stream = seam.new_stream()
        self._resources.callback(seam.free_stream, self._stream)
        self._resources.callback(seam.synchronise, self._stream)
        weights = DeviceWeights(seam, self._memory, self._stream, bundle, folder)
        self._resources.callback(weights.close)

        def opened(name: GraphName) -> LoweredGraph:
            graph = LoweredGraph(seam, bundle, folder, name, weights, self._stream)
            self._resources.callback(graph.close)
            return graph

        self._prefill, decode = opened("prefill"), opened("decode")
        top = opened("top_logits") if "top_logits" in found.graphs else None
        self._cache = DeviceKVCache(
            seam,
            self._memory,
            self._stream,
            names=[f"{i}.{part}" for i in range(model.num_hidden_layers) for part in _PARTS],
            heads=heads,
            token_bytes=token_bytes,
            max_context=bundle.manifest.max_context,
        )
        self._resources.callback(self._cache.clear)
        sizes = CallSizes(
            rows=BLOCK_SIZES[-1],
            sequence=MAX_CALL_TOKENS // BLOCK_SIZES[-1],
            num_logits=MAX_CALL_LOGITS // BLOCK_SIZES[-1],
            vocab_size=self._limits.vocab_size,
        )
        self._choices: DeviceChoices | None = None
        try:
            self._buffers = CallBuffers(self._memory, sizes)
            if decode.has("next_tokens"):
                device = (seam, top, self._stream, self._memory, self._buffers.logits)
                self._choices = DeviceChoices(*device, sizes, self._name)
                self._resources.callback(self._choices.close)
        except DeviceMemoryError as error:
            raise BackendError(
                f"{self._name} needs {sizes.num_bytes} bytes for inputs and logits on the GPU and in "
                f"page-locked memory, got {seam.free_bytes()} free ones on the GPU ({error}); free "
                "GPU memory, or build the bundle with --precision int8 or int4"
            ) from error
        seam.zero(self._buffers.decode_indices, BLOCK_SIZES[-1] * ID_BYTES, self._stream)
        self._binder = CallBinder(
            seam.device_type,
            self._buffers,
            self._cache,
            self._choices,
            cache_shape=(heads, head_dim),
            cache_type=cache_type,
            vocab_size=self._limits.vocab_size,
        )
        self._decoder = Decoder(
            seam, decode, self._stream, self._buffers, self._cache, self._binder, self._choices
        )
        self._resources.callback(self._decoder.forget)
        # First of all that `close` does: graphs may be at work.
        self._resources.callback(seam.synchronise, self._stream)
        self._staging: DecodeStaging | None = None
        self._blocks: list[tuple[int, int]] = []
        self.num_top_rows = self.num_whole_rows = 0

    @property
    def limits(self) -> Limits:
        """Sizes that do not change."""
        return self._limits

    @property
    def num_slots(self) -> int:
        """Slots allocated now."""
        return self._cache.num_slots

    @property
    def capacity(self) -> int:
        """Tokens a slot can hold now."""
        return self._cache.capacity

    @property
    def cache_bytes(self) -> int:
        """Bytes of all cache buffers."""
        return self._cache.num_bytes

    @property
    def device_bytes(self) -> int:
        """Bytes of weights, caches, inputs and logits; not of ONNX Runtime's activations."""
        return self._memory.device_bytes

    @property
    def num_graphs(self) -> int:
        """CUDA graphs captured now."""
        return self._decoder.num_graphs

    @property
    def has_argmax(self) -> bool:
        """See `ArgmaxRunner.has_argmax`."""
        return self._choices is not None

    @property
    def num_top(self) -> int:
        """See `TopLogitsRunner.num_top`."""
        return 0 if self._choices is None else self._choices.num_top

    def allocate(self, slots: int, capacity: int) -> None:
        """See `ModelRunner.allocate`. Where memory is short, every slot is as before."""
        self._require_open()
        wanted = self._cache.target(slots, capacity)
        if wanted == (self.num_slots, self.capacity):
            return
        self._seam.synchronise(self._stream)
        self._decoder.forget()
        try:
            self._resize(*wanted)
        except CapacityError:
            least = self._cache.least(slots, capacity)
            if least in (wanted, (self.num_slots, self.capacity)):
                raise
            self._resize(*least)

    def grow(self, capacity: int) -> None:
        """See `ModelRunner.grow`."""
        if capacity > self.capacity:
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

        Rows of neighbouring slots that begin at 0 and are equally long share calls; long ones run
        in chunks. No row is padded.
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
        """See `ModelRunner.decode`. Blocks of slots run one after the other without waiting."""
        staging = self._step(slots, tokens, "logits")
        first = int(slots[0])
        if np.array_equal(slots, np.arange(first, first + len(slots))):
            return staging.logits[first : first + len(slots)]
        return np.asarray(staging.logits[np.asarray(slots)])

    def decode_argmax(self, slots: Sequence[int], tokens: Sequence[int]) -> IntArray:
        """See `ArgmaxRunner.decode_argmax`."""
        self._step(slots, tokens, "token")
        assert self._choices is not None, "asked for only where has_argmax"
        return self._choices.best(slots)

    def decode_top(self, slots: Sequence[int], tokens: Sequence[int]) -> TopLogits:
        """See `TopLogitsRunner.decode_top`."""
        self._step(slots, tokens, "top")
        assert self._choices is not None, "asked for only where num_top is above 0"
        self.num_top_rows += len(slots)
        return self._choices.top(slots)

    def whole_logits(self, slots: Sequence[int]) -> FloatArray:
        """See `TopLogitsRunner.whole_logits`."""
        staging = self._staging
        assert staging is not None, "decode_top ran before"
        with self._queueing(len(slots)):
            self._decoder.bring_logits(slots, self._blocks, staging)
        self.num_whole_rows += len(slots)
        return np.asarray(staging.logits[np.asarray(slots)])

    def close(self) -> None:
        """See `ModelRunner.close`; safe to call twice."""
        self._closed = True
        self._staging = None
        self._resources.close()

    def _step(self, slots: Sequence[int], tokens: Sequence[int], bring: Bring) -> DecodeStaging:
        self._require_open()
        chosen = np.asarray(slots)
        self.grow(int(self._cache.lengths[chosen].max()) + 1)
        lengths, staging = self._cache.lengths, self._staging
        assert staging is not None, "decode before any slot was allocated"
        spans = list(decode_spans(sorted(slots), lengths, self._call_limits))
        blocks = [block_around(*span, lengths, self._limits.max_context) for span in spans]
        # Idle slots write too, so they need room.
        self.grow(max(int(lengths[first : first + rows].max()) for first, rows in blocks) + 1)
        staging, lengths = self._staging, self._cache.lengths
        assert staging is not None, "growing keeps it"
        staging.input_ids[:] = 0
        staging.input_ids[chosen] = tokens
        staging.past_lengths[:] = lengths
        with self._queueing(len(slots)):
            for first, rows in blocks:
                self._decoder.run(first, rows, staging, bring)
        lengths[chosen] += 1
        self._blocks = blocks
        return staging

    def _run_prefill(self, call: PrefillCall, tokens: Sequence[IntArray]) -> FloatArray:
        """Run one call; returns logits [rows, num_logits, V], valid until the next call."""
        rows, sequence, num_logits = len(call.chunks), call.sequence, call.num_logits
        buffers, seam, stream = self._buffers, self._seam, self._stream
        input_ids, past_lengths, indices = buffers.host_inputs(rows, sequence, num_logits)
        indices[:] = 0
        for row, chunk in enumerate(call.chunks):
            input_ids[row] = tokens[chunk.row.index][chunk.start : chunk.stop]
            past_lengths[row] = chunk.past
            indices[row, : len(chunk.wanted)] = chunk.wanted
        targets = (buffers.input_ids, buffers.past_lengths, buffers.logits_indices)
        counts = (rows * sequence, rows, rows * num_logits)
        for target, source, count in zip(targets, buffers.host_addresses, counts, strict=True):
            seam.to_device(target, source, count * ID_BYTES, stream)
        total = call.chunks[0].past + sequence
        binding = self._binder.bind(
            self._prefill, call.first_slot, rows, sequence, num_logits, total
        )
        with self._queueing(rows):
            seam.run(self._prefill.session, binding, stream, NO_GRAPH)
            if any(chunk.wanted for chunk in call.chunks):
                size = rows * num_logits * self._limits.vocab_size * LOGIT_BYTES
                seam.to_host(buffers.host_logits_address, buffers.logits, size, stream)
        return buffers.host_logits(rows, num_logits)

    def _resize(self, slots: int, capacity: int) -> None:
        staging = None
        if self._staging is None or slots != self.num_slots:
            try:
                staging = DecodeStaging(self._memory, slots, self._limits.vocab_size)
                if self._choices is not None:
                    self._choices.reserve(slots)
            except DeviceMemoryError as error:
                if staging is not None:
                    staging.close()
                raise CapacityError(
                    f"{slots} rows need page-locked memory of the host for their logits, which has "
                    "not that much left; ask for fewer rows at once"
                ) from error
        try:
            self._cache.resize(slots, capacity)
        except BaseException:
            if staging is not None:
                staging.close()
            raise
        if staging is not None:
            if self._staging is not None:
                self._staging.close()
            self._staging = staging

    @contextmanager
    def _queueing(self, rows: int) -> Iterator[None]:
        """Queue work of some rows inside; it is done afterwards, also what came before a failure.

        So its results may be read, and the next call's inputs staged where these were read from.
        """
        try:
            yield
        except DeviceMemoryError as error:
            raise BackendError(
                f"{self._name} has no GPU memory left for {rows} rows ({error}; {self.cache_bytes} "
                "bytes are KV cache); ask for fewer rows at once or shorter ones, or lower "
                "prefix_cache_slots"
            ) from error
        finally:
            self._seam.synchronise(self._stream)

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError("the runner is closed; open the bundle again")


_PARTS = ("key", "value")
