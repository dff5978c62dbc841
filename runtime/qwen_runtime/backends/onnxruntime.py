"""ONNX Runtime on the CPU: caller-owned caches, updated in place through IO binding.

One session over the prefill graph serves both phases. MatMul weights are packed when a session
loads; a second session over the decode graph would hold a second packed copy of every weight
(measured: docs/decisions.md), and at one token per row the two graphs cost the same.

The prefill graph is the one in ``lowered/cpu`` where a bundle has it, as those of int8 and int4
weights do, else the portable one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.base import FloatArray, IntArray, Limits
from qwen_runtime.backends.prompt_calls import cut, uniform_runs
from qwen_runtime.backends.sessions import (
    TOTAL_LENGTH,
    SessionSettings,
    check_threads,
    open_session,
)
from qwen_runtime.backends.versions import import_onnxruntime
from qwen_runtime.bundle import Bundle
from qwen_runtime.cache import KVCache
from qwen_runtime.errors import BackendError, RequestError

__all__ = ["OnnxRuntimeRunner"]

PREFILL_CHUNK = 512
"""Tokens of one call at most, over all its rows: bounds activation memory, costs nothing measurable
in speed."""

MAX_IDLE_ROWS = 8
"""Idle slots between running ones that run along; where more lie between them, two calls cost
less. Measured on two cores: a call costs as much as 12 more rows with the shape of Qwen2.5-0.5B
(4 layers: 22 ms and 1.8 ms), as much as 8 with the embedded model (1.6 ms and 0.2 ms)."""

MAX_BINDINGS = 32
"""Spans of slots whose buffers stay bound; a few belong to what runs, and others to what has run."""


class OnnxRuntimeRunner:
    """A `qwen_runtime.backends.base.ModelRunner` on ONNX Runtime's CPU provider.

    Args:
        bundle: An opened bundle with fp32 compute.
        threads: Threads for one operator; None for ONNX Runtime's choice, one per core.
        decode_graph: Run decode steps on decode.onnx instead of the prefill graph, as
            verification does to prove that graph too. Float weights are then not packed but
            mapped from the file, so that two sessions hold no copy of them; calls are up to a
            fifth slower.
        exact: Multiply quantised weights in fp32, as verification does to prove codes, scales
            and graph at the tolerance of fp32. Otherwise activations are rounded to int8 for it,
            each block of a token by its own scale: what a bundle is served with, and several
            times faster. Float weights know no difference.
        lowered: Run the bundle's graph for the CPU where it has one, instead of the portable one;
            not with ``decode_graph``.
        packed_cache: Map quantised weights from the user's cache folder, where the first load
            saves them packed (`qwen_runtime.backends.packed_cache`). Otherwise, and where the
            folder cannot be written, or with ``exact``, every load packs them in memory.

    Raises:
        BackendError: If onnxruntime is missing or too old, or cannot load the graphs.
        RequestError: If ``threads`` is no count, or ``exact`` is not true or false.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        decode_graph: bool = False,
        exact: bool = False,
        lowered: bool = True,
        packed_cache: bool = True,
    ) -> None:
        manifest = bundle.manifest
        if manifest.compute_dtype != "fp32":
            raise BackendError(
                f"{bundle.path}: the CPU needs a bundle with compute_dtype fp32, got "
                f"{manifest.compute_dtype}; build one without --compute-dtype"
            )
        check_threads(threads)
        if not isinstance(exact, bool):
            raise RequestError(f"exact must be True or False, got {exact!r}", param="exact")
        ort = import_onnxruntime(manifest.minimum_engine_versions.get("onnxruntime"))
        self._limits = Limits(manifest.model.vocab_size, manifest.max_context)
        names = [f"{i}.{part}" for i in range(manifest.model.num_hidden_layers) for part in _PARTS]
        self._cache = KVCache(
            names,
            num_key_value_heads=manifest.model.num_key_value_heads,
            head_dim=manifest.model.head_dim,
            dtype=np.float32,
            max_context=manifest.max_context,
        )
        settings = SessionSettings(
            threads,
            packed=not decode_graph,
            exact=exact,
            lowered=lowered and not decode_graph,
            cached=packed_cache,
        )
        open_graph = partial(open_session, ort, bundle, settings=settings)
        self._prefill = open_graph("prefill")
        self._decode = open_graph("decode") if decode_graph else None
        self._fused = _takes(self._prefill, TOTAL_LENGTH)
        self._block = gcd(2 * manifest.model.head_dim, _BLOCK_UNIT) if self._fused else None
        self._graph = _LOWERED if self._fused else manifest.graphs["prefill"].file
        self._bindings: dict[tuple[int, int], _DecodeBinding] = {}
        self._logits = _no_steps(self._limits)

    @property
    def limits(self) -> Limits:
        """Sizes that do not change."""
        return self._limits

    @property
    def graph(self) -> str:
        """The file in the bundle that runs prompts: of the lowered graph, or the portable one."""
        return self._graph

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

    def allocate(self, slots: int, capacity: int) -> None:
        """See `ModelRunner.allocate`."""
        self._require_open()
        replaced = True
        try:
            replaced = self._cache.reserve(slots, capacity)
        finally:
            if replaced:
                self._forget_bindings()

    def grow(self, capacity: int) -> None:
        """See `ModelRunner.grow`."""
        if capacity > self.capacity:
            self.allocate(self.num_slots, capacity)

    def copy(self, src: int, dst: int, length: int) -> None:
        """See `ModelRunner.copy`."""
        self._cache.copy(src, dst, length)

    def truncate(self, slot: int, length: int) -> None:
        """See `ModelRunner.truncate`. A slot without buffers, as after `close`, holds nothing."""
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

        Rows of equal length in neighbouring slots share a call, as far as PREFILL_CHUNK goes, in a
        lowered graph only where they begin; others run one by one. No row is padded: padding would
        cost time, and a row's numbers would depend on its neighbours.
        """
        self.grow(max(p + len(t) for p, t in zip(past, tokens, strict=True)))
        logits: list[FloatArray] = [_NO_LOGITS] * len(slots)
        runs = uniform_runs(
            slots, tokens, past, want, PREFILL_CHUNK, fused=self._fused, block=self._block
        )
        for rows in runs:
            first = slots[rows[0]]
            block = np.stack([tokens[row] for row in rows])
            lengths = np.array([past[row] for row in rows], np.int64)
            result = self._prefill_rows(first, block, lengths, want[rows[0]])
            for row, values in zip(rows, result, strict=True):
                logits[row] = values
        return logits

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """See `ModelRunner.decode`.

        Neighbouring slots run in one call. A few idle slots between them run along and write one
        token after their lengths, which the next real token overwrites.
        """
        self._require_open()
        lengths = self._cache.lengths
        self.grow(int(max(lengths[slot] for slot in slots)) + 1)
        lengths = self._cache.lengths
        order = np.argsort(np.asarray(slots))
        ordered = np.asarray(slots)[order]
        spans = list(self._spans(ordered))
        logits = np.empty(
            (len(slots) if len(spans) > 1 else 0, self._limits.vocab_size), np.float32
        )
        for start, stop in spans:
            binding = self._binding(int(ordered[start]), int(ordered[stop - 1]) + 1)
            chosen, rows = order[start:stop], ordered[start:stop] - ordered[start]
            binding.input_ids[:] = 0
            binding.input_ids[rows, 0] = np.asarray(tokens)[chosen]
            binding.set_lengths(lengths[ordered[start] : ordered[stop - 1] + 1])
            _run(binding.session, binding.io)
            if len(spans) > 1:
                logits[chosen] = binding.logits[rows, 0]
            elif np.array_equal(slots, np.arange(slots[0], slots[0] + len(slots))):
                logits = binding.logits[:, 0]
            else:
                logits = binding.logits[rows[np.argsort(order)], 0]
        lengths[ordered] += 1
        return logits

    def close(self) -> None:
        """See `ModelRunner.close`."""
        self._forget_bindings()
        self._cache.clear()
        self._prefill = self._decode = None

    def _require_open(self) -> None:
        if self._prefill is None:
            raise BackendError("the runner is closed; open the bundle again")

    def _binding(self, first: int, last: int) -> _DecodeBinding:
        binding = self._bindings.pop((first, last), None)
        if binding is None:
            if len(self._logits) < self.num_slots:
                self._logits = np.empty((self.num_slots, *self._logits.shape[1:]), np.float32)
            if len(self._bindings) == MAX_BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            session = self._decode or self._prefill
            logits = self._logits[: last - first]
            binding = _DecodeBinding(session, self._cache, first, last, logits)
        self._bindings[first, last] = binding  # the one used last is the last
        return binding

    def _forget_bindings(self) -> None:
        self._bindings.clear()
        self._logits = _no_steps(self._limits)

    def _prefill_rows(
        self, first: int, block: IntArray, past: IntArray, want: int
    ) -> list[FloatArray]:
        """Run [B, S] new tokens of slots first..first+B-1 in chunks; logits [want, V] per row."""
        batch, length = block.shape
        wanted = np.arange(length - want, length)
        parts: list[FloatArray] = []
        for start, stop in cut(length, PREFILL_CHUNK, self._block):
            chunk = np.ascontiguousarray(block[:, start:stop])
            inside = wanted[(wanted >= start) & (wanted < stop)] - start
            # Engines dislike empty tensors: a chunk without wanted positions asks for its first.
            asked = inside if len(inside) else _FIRST
            indices = np.ascontiguousarray(np.broadcast_to(asked, (batch, len(asked))))
            chunk_past = past + start
            io = self._prefill.io_binding()
            io.bind_cpu_input("input_ids", chunk)
            io.bind_cpu_input("past_lengths", chunk_past)
            io.bind_cpu_input("logits_indices", indices)
            total = np.array([chunk_past.max() + stop - start], np.int32)
            if self._fused:
                io.bind_cpu_input(TOTAL_LENGTH, total)
            io.bind_output("logits", "cpu")
            _bind_cache(io, self._cache, first, first + batch)
            _run(self._prefill, io)
            if len(inside):
                parts.append(io.get_outputs()[0].numpy())
        self._cache.lengths[first : first + batch] = past + length
        if not parts:
            return [_NO_LOGITS] * batch
        return list(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))

    def _spans(self, ordered: IntArray) -> Iterator[tuple[int, int]]:
        """Index ranges of sorted slots that one call can cover."""
        lengths, capacity = self._cache.lengths, self._cache.capacity
        start = 0
        for i in range(1, len(ordered)):
            idle = lengths[ordered[i - 1] + 1 : ordered[i]]
            if len(idle) > MAX_IDLE_ROWS or (idle >= capacity).any():
                yield start, i
                start = i
        yield start, len(ordered)


_PARTS = ("key", "value")
_BLOCK_UNIT = 32
"""GroupQueryAttention takes 2 * head_dim tokens at a time, or fewer where the processor's second
cache is small for that; this divides what it takes with any such cache of whole 256 KiB."""
_FIRST = np.zeros(1, np.int64)
_LOWERED = "lowered/cpu/prefill.onnx"
_NO_LOGITS: FloatArray = np.empty((0, 0), np.float32)


class _DecodeBinding:
    """Fixed buffers of one decode call over slots first..last-1, bound once.

    Its logits, [rows, 1, V], are the runner's, who has them for one call at a time.
    """

    def __init__(
        self, session: Any, cache: KVCache, first: int, last: int, logits: FloatArray
    ) -> None:
        rows = last - first
        self.session = session
        self.input_ids = np.zeros((rows, 1), np.int64)
        self._past_lengths = np.zeros(rows, np.int64)
        self._total = np.zeros(1, np.int32)
        self.logits = logits
        self._indices = np.zeros((rows, 1), np.int64)
        self.io = session.io_binding()
        inputs: dict[str, npt.NDArray[Any]] = {
            "input_ids": self.input_ids,
            "past_lengths": self._past_lengths,
            "logits_indices": self._indices,
            TOTAL_LENGTH: self._total,
        }
        for name, array in inputs.items():
            if _takes(session, name):
                self.io.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.io.bind_output(
            "logits", "cpu", 0, np.float32, self.logits.shape, self.logits.ctypes.data
        )
        _bind_cache(self.io, cache, first, last)

    def set_lengths(self, lengths: IntArray) -> None:
        """Say how many tokens each row has, [rows]."""
        self._past_lengths[:] = lengths
        self._total[0] = lengths.max() + 1


def _takes(session: Any, name: str) -> bool:
    """Whether a session's graph has an input."""
    return any(entry.name == name for entry in session.get_inputs())


def _no_steps(limits: Limits) -> FloatArray:
    return np.empty((0, 1, limits.vocab_size), np.float32)


def _bind_cache(io: Any, cache: KVCache, first: int, last: int) -> None:
    """Bind past and present of every layer to one and the same memory."""
    for name, view in cache.rows(first, last):
        place = ("cpu", 0, cache.dtype, view.shape, view.ctypes.data)
        io.bind_input(f"past_key_values.{name}", *place)
        io.bind_output(f"present.{name}", *place)


def _run(session: Any, io: Any) -> None:
    try:
        session.run_with_iobinding(io)
    except Exception as error:
        raise BackendError(f"ONNX Runtime could not run the graph: {error}") from error
