"""A GPU made of the host's memory: ONNX Runtime's CPU provider in real sessions, on real addresses.

What runs above the seam is what runs on a GPU: sessions on the lowered graphs, initialisers shared
through DLPack, caches bound to past and present. The double adds what a GPU would not tell: every
address must lie in an allocation, work is done only when a stream is synchronised or a session
runs, and a captured graph runs with what was bound when it was captured. What a GPU would answer
with corruption is a `FaultError`.
"""

from __future__ import annotations

import ctypes
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from qwen_runtime.backends.cuda.seam import NO_GRAPH, Provider
from qwen_runtime.backends.device_seam import DeviceInfo, DeviceMemoryError
from qwen_runtime.errors import BackendError

__all__ = ["FaultError", "HostSeam"]

POISON = 0xFF
ALIGNMENT = 256
ELEMENT_BYTES = {1: 4, 2: 1, 6: 4, 7: 8, 10: 2, 16: 2}


class FaultError(AssertionError):
    """Something a GPU would have answered with corruption, not with an error."""


class Binding(onnxruntime.IOBinding):
    """Remembers what is bound: name to device, address and bytes, and to shape."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        self.places: dict[str, tuple[str, int, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def bind_input(self, name: str, *place: Any) -> None:
        self._note(name, *place)
        super().bind_input(name, *place)

    def bind_output(self, name: str, *place: Any) -> None:
        self._note(name, *place)
        super().bind_output(name, *place)

    def _note(
        self, name: str, device: str, index: int, kind: int, shape: Sequence[int], address: int
    ) -> None:
        size = ELEMENT_BYTES[kind] * int(np.prod(shape))
        self.places[name], self.shapes[name] = (device, address, size), tuple(shape)


class Session(onnxruntime.InferenceSession):
    """Hands out bindings that remember."""

    def io_binding(self) -> Binding:
        return Binding(self)


@dataclass
class Captured:
    """A graph: what was bound when it was captured."""

    binding: Binding
    places: dict[str, tuple[str, int, int]]
    host: dict[str, bytes]
    """What the host read when it was queued."""


class HostSeam:
    """See `qwen_runtime.backends.cuda.seam.CudaSeam`.

    Attributes:
        counts: How often things happened: "run", "capture", "launch", "release", "synchronise",
            "allocation", and bytes copied "to_device", "to_host" and "on_device".
        ran: input_ids' shape of every run.
        captures: For every capture, its first slot's address of the first cache, and its rows.
    """

    device_type = "cpu"
    dlpack_device = 1

    def __init__(
        self,
        *,
        memory: int = 256 << 20,
        sm: int = 90,
        cuda_versions: tuple[int, int] = (13050, 13050),
        gpus: int = 1,
        fail_at: int | None = None,
        fail_run_at: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        entries: dict[str, str] | None = None,
    ) -> None:
        self.onnxruntime = types.SimpleNamespace(
            InferenceSession=Session,
            OrtValue=onnxruntime.OrtValue,
            __version__=onnxruntime.__version__,
        )
        self.counts: Counter[str] = Counter()
        self.ran: list[tuple[int, ...]] = []
        self.captures: list[tuple[int, int]] = []
        self.sessions: list[dict[str, bool]] = []
        self._memory, self._sm, self._versions, self._gpus = memory, sm, cuda_versions, gpus
        self._fail_at, self._fail_run_at = fail_at, fail_run_at
        self._providers, self._entries = providers, entries or {}
        self._blocks: dict[int, npt.NDArray[np.uint8]] = {}
        self._host: dict[int, npt.NDArray[np.uint8]] = {}
        self._streams: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[tuple[int, int], Captured | None] = {}
        self._next = 1

    def leaks(self) -> dict[str, int]:
        """What was not given back."""
        graphs = [graph for graph in self._graphs.values() if graph is not None]
        kinds = {
            "device": self._blocks,
            "host": self._host,
            "streams": self._streams,
            "graphs": graphs,
        }
        return {name: len(kind) for name, kind in kinds.items() if kind}

    # --- ONNX Runtime

    def providers(self, stream: int, *, capture: bool, tf32: bool) -> Sequence[Provider]:
        assert stream in self._streams
        self.sessions.append({"capture": capture, "tf32": tf32})
        return [(name, {}) for name in self._providers]

    def session_options(self, *, allow_cpu: bool = False) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # In float16 the CPU's provider casts initialisers, which its optimiser then looks for in
        # weights.bin.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for key, value in {} if allow_cpu else self._entries.items():
            options.add_session_config_entry(key, value)
        return options

    def run(self, session: Any, binding: Any, stream: int, graph: int) -> None:
        self.counts["run"] += 1
        if self.counts["run"] == self._fail_run_at:
            raise DeviceMemoryError("ONNX Runtime could not run the graph: out of memory")
        if graph != NO_GRAPH:
            binding = self._captured(session, binding, graph).binding
        self._check(binding)
        self._drain(stream)
        try:
            session.run_with_iobinding(binding)
        except Exception as error:
            raise BackendError(f"ONNX Runtime could not run the graph: {error}") from error
        if "input_ids" in binding.shapes:
            self.ran.append(binding.shapes["input_ids"])

    def release_graph(self, session: Any, graph: int) -> None:
        self._idle("a graph was destroyed")
        if self._graphs.get((id(session), graph)) is None:
            raise FaultError(f"graph {graph} was released and is none")
        self.counts["release"] += 1
        self._graphs[id(session), graph] = None

    def _captured(self, session: Any, binding: Binding, graph: int) -> Captured:
        key = (id(session), graph)
        host = {
            name: bytes(np.ctypeslib.as_array(_bytes_at(address, size)))
            for name, (device, address, size) in binding.places.items()
            if name == "total_sequence_length"
        }
        if key not in self._graphs:
            self.counts["capture"] += 1
            first = binding.places["past_key_values.0.key"][1]
            self.captures.append((first, binding.shapes["input_ids"][0]))
            self._graphs[key] = Captured(binding, dict(binding.places), host)
        found = self._graphs[key]
        if found is None:
            raise FaultError(f"graph {graph} was run after it was released")
        self.counts["launch"] += 1
        if found.places != binding.places or found.host != host:
            raise FaultError(f"graph {graph} was captured with other memory than is bound now")
        return found

    def _check(self, binding: Binding) -> None:
        for name, (_, address, size) in binding.places.items():
            if name == "total_sequence_length":
                continue
            self._slice(address, size)
            if address % 16:
                raise FaultError(f"{name} was bound to {address:#x}, which is not aligned")
            if name.startswith("past_key_values."):
                present = binding.places[name.replace("past_key_values", "present")]
                if present[1] != address:
                    raise FaultError(f"{name} and its output were bound to different memory")

    # --- memory

    def cuda_versions(self) -> tuple[int, int]:
        return self._versions

    def device(self) -> DeviceInfo:
        if not self._gpus:
            raise BackendError("CUDA finds no GPU")
        return DeviceInfo("Host", self._sm)

    def free_bytes(self) -> int:
        return self._memory - sum(len(block) for block in self._blocks.values())

    def malloc(self, num_bytes: int) -> int:
        self._allocate_or_fail("cudaMalloc")
        assert num_bytes > 0
        if num_bytes > self.free_bytes():
            raise DeviceMemoryError("cudaMalloc failed: out of memory")
        return _keep(self._blocks, num_bytes)

    def free(self, address: int) -> None:
        self._idle("device memory was freed")
        self._blocks.pop(address)[:] = POISON

    def host_malloc(self, num_bytes: int) -> int:
        self._allocate_or_fail("cudaMallocHost")
        return _keep(self._host, num_bytes)

    def host_free(self, address: int) -> None:
        self._idle("page-locked memory was freed")
        self._host.pop(address)[:] = POISON

    def host_view(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        return _inside(self._host, address, num_bytes)

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        self._streams[stream].append(lambda: self._slice(address, num_bytes).fill(0))

    def to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        def run() -> None:
            self.counts["to_device"] += num_bytes
            self._slice(target, num_bytes)[:] = self.host_view(source, num_bytes)

        self._streams[stream].append(run)

    def to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        def run() -> None:
            self.counts["to_host"] += num_bytes
            self.host_view(target, num_bytes)[:] = self._slice(source, num_bytes)

        self._streams[stream].append(run)

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

        self._streams[stream].append(run)

    # --- streams

    def new_stream(self) -> int:
        self._next += 1
        self._streams[self._next] = []
        return self._next

    def free_stream(self, stream: int) -> None:
        self._idle("a stream was destroyed")
        del self._streams[stream]

    def synchronise(self, stream: int) -> None:
        self.counts["synchronise"] += 1
        self._drain(stream)

    def _drain(self, stream: int) -> None:
        work = self._streams[stream]
        while work:
            work.pop(0)()

    def _idle(self, what: str) -> None:
        if any(self._streams.values()):
            raise FaultError(f"{what} while work was pending")

    def _slice(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        return _inside(self._blocks, address, num_bytes)

    def _allocate_or_fail(self, name: str) -> None:
        self.counts["allocation"] += 1
        if self.counts["allocation"] == self._fail_at:
            raise DeviceMemoryError(f"{name} failed: out of memory")


def _keep(blocks: dict[int, npt.NDArray[np.uint8]], num_bytes: int) -> int:
    array = np.full(num_bytes + ALIGNMENT, POISON, np.uint8)
    array = array[-array.ctypes.data % ALIGNMENT :][:num_bytes]
    blocks[array.ctypes.data] = array
    return int(array.ctypes.data)


def _inside(
    blocks: dict[int, npt.NDArray[np.uint8]], address: int, num_bytes: int
) -> npt.NDArray[np.uint8]:
    for start, array in blocks.items():
        if start <= address and address + num_bytes <= start + len(array):
            return array[address - start :][:num_bytes]
    raise FaultError(f"{num_bytes} bytes at {address:#x} are not inside an allocation")


def _bytes_at(address: int, size: int) -> Any:
    return (ctypes.c_uint8 * size).from_address(address)
