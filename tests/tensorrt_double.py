"""TensorRT and CUDA in memory: a device that computes, and that notices what a GPU would not.

Device memory is one array with made-up addresses; every access must lie inside an allocation.
Streams hold back their work until they are synchronised, so that whoever reads too early reads
poison. Running an engine computes the bundle's float32 graph on ONNX Runtime, from and to the
engine's own types in device memory: no answer is canned. What would corrupt memory or give wrong
numbers on a GPU is a `FaultError`; what a GPU would refuse is the runner's own kind of error.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime

from qwen_runtime.backends.tensorrt.seam import DeviceInfo, DeviceMemoryError, TensorInfo
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError

__all__ = ["FaultError", "TensorRtDouble"]

VERSION = "1.7.1.116"
MAGIC = b"vtrt"
BASE = 0x7F00_0000_0000
GUARD = 4096
POISON = 0xFF
TYPES = {
    "FLOAT": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "HALF": np.dtype(np.float16),
    "INT64": np.dtype(np.int64),
}


class FaultError(AssertionError):
    """Something a GPU would have answered with corruption, not with an error."""


@dataclass
class _Engine:
    content: dict[str, Any]
    tensors: dict[str, TensorInfo]
    session: Any


@dataclass
class _Context:
    engine: int
    profile: int
    fixed_shape: bool
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    scratch: tuple[int, int] | None = None
    settled: bool = False
    """Whether it has run with the shapes it has."""


@dataclass(frozen=True)
class _Work:
    """What a stream or a graph holds."""

    run: Callable[[], None]
    check: Callable[[], None] = lambda: None
    """At every launch of the graph it is in."""
    uses: tuple[tuple[str, int], ...] = ()


class TensorRtDouble:
    """See `qwen_runtime.backends.tensorrt.seam.Seam`.

    Attributes:
        counts: How often things happened: "enqueue", "launch", "synchronise", "capture",
            "context", "allocation" (memory, contexts and graphs), and bytes copied "to_device", "to_host" and "on_device".
        ran: What every run of an engine was: its plan's graph, profile and input_ids' shape.
    """

    def __init__(
        self,
        *,
        memory: int = 64 << 20,
        sm: int = 89,
        version: str = VERSION,
        cuda_versions: tuple[int, int] = (13050, 13050),
        gpus: int = 1,
        capturable: bool = True,
        fail_at: int | None = None,
        fail_enqueue_at: int | None = None,
        invalid: tuple[str, ...] = (),
    ) -> None:
        self.flavour, self.version = "tensorrt-rtx", version
        self.counts: Counter[str] = Counter()
        self.ran: list[tuple[str, int, tuple[int, ...]]] = []
        self._sm, self._versions, self._gpus = sm, cuda_versions, gpus
        self._capturable, self._invalid = capturable, invalid
        self._fail_at, self._fail_enqueue_at = fail_at, fail_enqueue_at
        self._arena = np.full(memory, POISON, np.uint8)
        self._blocks: dict[int, int] = {}
        self._host: dict[int, np.ndarray] = {}
        self.engines: dict[int, _Engine] = {}
        self.contexts: dict[int, _Context] = {}
        self.streams: dict[int, list[_Work]] = {}
        self.graphs: dict[int, list[_Work]] = {}
        self._capturing: dict[int, list[_Work]] = {}
        self._next = 100

    def leaks(self) -> dict[str, int]:
        """What was not given back."""
        kinds = {
            "device": self._blocks,
            "host": self._host,
            "engines": self.engines,
            "contexts": self.contexts,
            "streams": self.streams,
            "graphs": self.graphs,
        }
        return {name: len(kind) for name, kind in kinds.items() if kind}

    def cuda_versions(self) -> tuple[int, int]:
        return self._versions

    def device(self) -> DeviceInfo:
        if not self._gpus:
            raise BackendError("CUDA finds no GPU")
        return DeviceInfo("Double", self._sm)

    def free_bytes(self) -> int:
        return len(self._arena) - sum(self._blocks.values())

    # --- engines and contexts

    def validity(self, plan: Path) -> tuple[str, ...]:
        with plan.open("rb") as file:
            return self._invalid or (() if file.read(4) == MAGIC else ("MALFORMED_ENGINE",))

    def load(self, plan: Path) -> int:
        try:
            content = json.loads(plan.read_bytes()[len(MAGIC) :])
        except ValueError as error:
            raise BackendError(f"TensorRT could not load {plan}: bad magic") from error
        bundle = Bundle.open(content["bundle"])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(bundle.file(bundle.manifest.graphs[content["graph"]].file)),
            options,
            providers=["CPUExecutionProvider"],
        )
        tensors = {
            name: TensorInfo(name, is_input, dtype, tuple(shape))
            for name, is_input, dtype, shape in content["tensors"]
        }
        return self._keep(self.engines, _Engine(content, tensors, session))

    def free_engine(self, engine: int) -> None:
        if any(context.engine == engine for context in self.contexts.values()):
            raise FaultError("an engine was destroyed before its contexts")
        del self.engines[engine]

    def tensors(self, engine: int) -> tuple[TensorInfo, ...]:
        return tuple(self.engines[engine].tensors.values())

    def alias(self, engine: int, output: str) -> str | None:
        return self.engines[engine].content["aliases"].get(output)

    def min_shape(self, engine: int, name: str, profile: int) -> tuple[int, ...]:
        return tuple(self.engines[engine].content["profiles"][profile][name][0])

    def max_shape(self, engine: int, name: str, profile: int) -> tuple[int, ...]:
        return tuple(self.engines[engine].content["profiles"][profile][name][1])

    def scratch_bytes(self, engine: int, profile: int) -> int:
        return int(self.engines[engine].content["scratch"][profile])

    def new_context(self, engine: int, profile: int, stream: int, *, fixed_shape: bool) -> int:
        self._not_capturing("a context was created")
        if self._allocation_fails():
            raise BackendError("TensorRT could not create a context: out of memory")
        assert stream in self.streams
        self.counts["context"] += 1
        return self._keep(self.contexts, _Context(engine, profile, fixed_shape))

    def free_context(self, context: int) -> None:
        self._idle("context", context)
        for graph in self.graphs.values():
            if any(("context", context) in work.uses for work in graph):
                raise FaultError("a context was destroyed before a graph captured in it")
        del self.contexts[context]

    def set_scratch(self, context: int, address: int, num_bytes: int) -> None:
        it = self.contexts[context]
        needed = self.scratch_bytes(it.engine, it.profile)
        if address % 256 or num_bytes < needed:
            raise FaultError(
                f"scratch memory must be aligned and of {needed} bytes, got {num_bytes}"
            )
        self._slice(address, num_bytes)
        it.scratch = (address, num_bytes)

    def set_shape(self, context: int, name: str, shape: Sequence[int]) -> None:
        it = self.contexts[context]
        low = self.min_shape(it.engine, name, it.profile)
        high = self.max_shape(it.engine, name, it.profile)
        inside = len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )
        if not inside:
            raise BackendError(
                f"TensorRT could not give {name} the shape {tuple(shape)}: profile {it.profile} "
                f"takes {low} to {high}"
            )
        if it.shapes.get(name) != tuple(shape):
            it.shapes[name], it.settled = tuple(shape), False

    def set_address(self, context: int, name: str, address: int) -> None:
        it = self.contexts[context]
        if name not in self.engines[it.engine].tensors:
            raise BackendError(f"TensorRT could not bind {name}: there is no such tensor")
        if address % 256:
            raise FaultError(f"{name} was bound to {address:#x}, which is not aligned")
        it.addresses[name] = address

    def missing(self, context: int) -> tuple[str, ...]:
        it = self.contexts[context]
        return tuple(
            tensor.name
            for tensor in self.engines[it.engine].tensors.values()
            if not it.addresses.get(tensor.name)
            or (tensor.is_input and tensor.name not in it.shapes)
        )

    def capturable(self, context: int, stream: int) -> bool:
        return self._capturable

    def enqueue(self, context: int, stream: int) -> None:
        self.counts["enqueue"] += 1
        if self.counts["enqueue"] == self._fail_enqueue_at:
            raise BackendError("TensorRT could not run the engine: an illegal memory access")
        it = self.contexts[context]
        engine = self.engines[it.engine]
        if self.missing(context) or it.scratch is None:
            raise FaultError(f"an engine ran without {self.missing(context) or 'scratch memory'}")
        for output, source in engine.content["aliases"].items():
            if it.addresses[output] != it.addresses[source]:
                raise FaultError(f"{output} and {source} were bound to different memory")
        if stream in self._capturing and not it.settled:
            raise FaultError("a run was captured before the context had run with its shapes")
        it.settled = True
        shapes, addresses = dict(it.shapes), dict(it.addresses)
        scratch = it.scratch

        def unchanged() -> None:
            if (it.shapes, it.addresses, it.scratch) != (shapes, addresses, scratch):
                raise FaultError("a context was changed after a graph was captured in it")

        self._give(
            stream,
            _Work(
                lambda: self._execute(engine, it.profile, shapes, addresses, scratch),
                unchanged,
                (("context", context),),
            ),
        )

    def _execute(
        self,
        engine: _Engine,
        profile: int,
        shapes: dict[str, tuple[int, ...]],
        addresses: dict[str, int],
        scratch: tuple[int, int],
    ) -> None:
        self.ran.append((engine.content["graph"], profile, shapes["input_ids"]))
        self._slice(*scratch)[:] = POISON
        feeds = {
            name: self._read(addresses[name], shape, engine.tensors[name].dtype)
            for name, shape in shapes.items()
        }
        _, sequence = shapes["input_ids"]
        vocab = engine.tensors["logits"].shape[-1]
        if not ((feeds["input_ids"] >= 0) & (feeds["input_ids"] < vocab)).all():
            raise FaultError("a token is outside of the vocabulary")
        capacity = next(shape[2] for shape in shapes.values() if len(shape) == 4)
        past = feeds["past_lengths"]
        if not ((past >= 0) & (past + sequence <= capacity)).all():
            raise FaultError(f"{past} + {sequence} tokens do not fit into {capacity}")
        if "logits_indices" in feeds:
            indices = feeds["logits_indices"]
            if not ((indices >= 0) & (indices < sequence)).all():
                raise FaultError(f"logits are wanted at {indices} of {sequence}")
        names = [tensor.name for tensor in engine.tensors.values() if not tensor.is_input]
        for name, values in zip(names, engine.session.run(names, feeds), strict=True):
            self._write(addresses[name], values, engine.tensors[name].dtype)

    # --- memory

    def malloc(self, num_bytes: int) -> int:
        self._not_capturing("memory was allocated")
        self._allocate_or_fail("cudaMalloc")
        start = 0
        for address, size in sorted(self._blocks.items()):
            if address - BASE - start >= num_bytes + GUARD:
                break
            start = -(-(address - BASE + size + GUARD) // 256) * 256
        if start + num_bytes > len(self._arena):
            raise DeviceMemoryError("cudaMalloc failed: out of memory")
        assert num_bytes > 0
        self._blocks[BASE + start] = num_bytes
        self._slice(BASE + start, num_bytes)[:] = POISON
        return BASE + start

    def free(self, address: int) -> None:
        if any(self.streams.values()):
            raise FaultError("device memory was freed while work was pending")
        self._slice(address, self._blocks[address])[:] = POISON
        del self._blocks[address]

    def host_malloc(self, num_bytes: int) -> int:
        self._allocate_or_fail("cudaMallocHost")
        array = np.full(num_bytes, POISON, np.uint8)
        self._host[array.ctypes.data] = array
        return int(array.ctypes.data)

    def host_free(self, address: int) -> None:
        if any(self.streams.values()):
            raise FaultError("page-locked memory was freed while work was pending")
        self._host.pop(address)[:] = POISON

    def host_view(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        for start, array in self._host.items():
            if start <= address and address + num_bytes <= start + len(array):
                return array[address - start :][:num_bytes]
        raise FaultError(f"{num_bytes} bytes at {address:#x} are not inside page-locked memory")

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        self._give(stream, _Work(lambda: self._slice(address, num_bytes).fill(0)))

    def to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        def run() -> None:
            self.counts["to_device"] += num_bytes
            self._slice(target, num_bytes)[:] = self.host_view(source, num_bytes)

        self._give(stream, _Work(run))

    def to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        def run() -> None:
            self.counts["to_host"] += num_bytes
            self.host_view(target, num_bytes)[:] = self._slice(source, num_bytes)

        self._give(stream, _Work(run))

    def on_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self.on_device_2d(
            target, source, pitch=num_bytes, width=num_bytes, height=1, stream=stream
        )

    def on_device_2d(
        self,
        target: int,
        source: int,
        *,
        pitch: int,
        width: int,
        height: int,
        stream: int,
        source_pitch: int | None = None,
    ) -> None:
        apart = source_pitch or pitch
        if not 0 < width <= min(pitch, apart):
            raise FaultError(f"a copy of {width} bytes every {pitch} from every {apart}")

        def run() -> None:
            self.counts["on_device"] += width * height
            for row in range(height):
                content = self._slice(source + row * apart, width)
                self._slice(target + row * pitch, width)[:] = content

        self._give(stream, _Work(run))

    # --- streams and graphs

    def new_stream(self) -> int:
        return self._keep(self.streams, [])

    def free_stream(self, stream: int) -> None:
        if self.streams[stream]:
            raise FaultError("a stream was destroyed with work in it")
        del self.streams[stream]

    def synchronise(self, stream: int) -> None:
        self._not_capturing("a stream was synchronised")
        self.counts["synchronise"] += 1
        work = self.streams[stream]
        while work:
            work.pop(0).run()

    def begin_capture(self, stream: int) -> None:
        self._capturing[stream] = []

    def end_capture(self, stream: int) -> int:
        graph = self._capturing.pop(stream)
        self._allocate_or_fail("cudaGraphInstantiate")
        self.counts["capture"] += 1
        return self._keep(self.graphs, graph)

    def abort_capture(self, stream: int) -> None:
        del self._capturing[stream]

    def launch(self, graph: int, stream: int) -> None:
        self.counts["launch"] += 1
        for work in self.graphs[graph]:
            work.check()
            uses = (*work.uses, ("graph", graph))
            self.streams[stream].append(_Work(work.run, work.check, uses))

    def free_graph(self, graph: int) -> None:
        self._idle("graph", graph)
        del self.graphs[graph]

    # --- inside

    def _keep(self, where: dict[int, Any], thing: Any) -> int:
        self._next += 1
        where[self._next] = thing
        return self._next

    def _give(self, stream: int, work: _Work) -> None:
        (self._capturing if stream in self._capturing else self.streams)[stream].append(work)

    def _idle(self, kind: str, handle: int) -> None:
        if any((kind, handle) in work.uses for queue in self.streams.values() for work in queue):
            raise FaultError(f"a {kind} was destroyed while it was pending")

    def _not_capturing(self, what: str) -> None:
        if self._capturing:
            raise FaultError(f"{what} while a graph was captured")

    def _allocate_or_fail(self, what: str) -> None:
        if self._allocation_fails():
            raise DeviceMemoryError(f"{what} failed: out of memory")

    def _allocation_fails(self) -> bool:
        self.counts["allocation"] += 1
        return self.counts["allocation"] == self._fail_at

    def _slice(self, address: int, num_bytes: int) -> np.ndarray:
        for start, size in self._blocks.items():
            if start <= address and address + num_bytes <= start + size:
                return self._arena[address - BASE :][:num_bytes]
        raise FaultError(f"{num_bytes} bytes at {address:#x} are not inside device memory")

    def _read(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        kind = TYPES[dtype]
        raw = self._slice(address, kind.itemsize * int(np.prod(shape)))
        values = raw.view(kind).reshape(shape)
        return values.copy() if dtype == "INT64" else values.astype(np.float32)

    def _write(self, address: int, values: np.ndarray, dtype: str) -> None:
        raw = np.ascontiguousarray(values.astype(TYPES[dtype])).view(np.uint8).reshape(-1)
        self._slice(address, len(raw))[:] = raw
