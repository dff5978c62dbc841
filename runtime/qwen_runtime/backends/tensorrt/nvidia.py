"""The seam's implementation: ``tensorrt_rtx_bindings`` or ``tensorrt``, and ``cuda.bindings``.

No logic: what is done with a call stands above this module, where it is tested without a GPU. Of
this module only what works without a driver has been executed: importing, the refusal for want of
a driver, reading a plan's validity. A test holds every name it uses against the real bindings.

Sources: TensorRT-RTX 1.7 and TensorRT 11 Python API; CUDA Runtime API 13. `is_stream_capturable`,
the engine's validity and the runtime configuration exist in TensorRT-RTX only.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen_runtime.backends.nvidia_device import NvidiaDevice, import_for
from qwen_runtime.backends.tensorrt.seam import Seam, TensorInfo
from qwen_runtime.errors import BackendError

__all__ = ["MODULES", "NvidiaSeam", "load_seam"]

MODULES = {"tensorrt-rtx": "tensorrt_rtx_bindings", "tensorrt": "tensorrt"}
"""Flavour, which is also the name of the extra that installs it, to Python module."""


def load_seam(flavour: str) -> Seam:
    """Import a flavour of TensorRT and CUDA's bindings.

    Args:
        flavour: A key of `MODULES`.

    Raises:
        BackendError: If one of them is not installed.
    """
    purpose = f"run {flavour} engines"
    return NvidiaSeam(
        flavour,
        import_for(MODULES[flavour], purpose, flavour),
        import_for("cuda.bindings.runtime", purpose, flavour),
    )


class NvidiaSeam(NvidiaDevice):
    """See `Seam`.

    Args:
        flavour: A key of `MODULES`.
        trt: Its module.
        cuda: The module ``cuda.bindings.runtime``.
    """

    def __init__(self, flavour: str, trt: ModuleType, cuda: ModuleType) -> None:
        super().__init__(cuda)
        self.flavour = flavour
        self._trt: Any = trt
        self.version: str = trt.__version__
        self._log = _logger(trt)
        self._runtime: Any = None
        self._engines: dict[int, Any] = {}
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[int, Any] = {}
        self._kernels: dict[int, Any] = {}
        """Per engine of TensorRT-RTX: kernels compiled for one context, which others reuse."""
        self._next = 1

    @property
    def _rtx(self) -> bool:
        return self.flavour == "tensorrt-rtx"

    def validity(self, plan: Path) -> tuple[str, ...]:
        """See `Seam.validity`. Enterprise TensorRT has no such query: empty.

        Invalid without a reason is what a missing driver gives: left to `load`.
        """
        if not self._rtx:
            return ()
        runtime = self._trt_runtime()
        with plan.open("rb") as file:
            header = file.read(runtime.engine_header_size)
        valid, bits = runtime.get_engine_validity(header)
        if valid != self._trt.EngineValidity.INVALID:
            return ()
        reasons = self._trt.EngineInvalidityDiagnostics.__members__.items()
        return tuple(name for name, value in reasons if int(bits) & int(value))

    def load(self, plan: Path) -> int:
        """See `Seam.load`."""
        runtime = self._trt_runtime()
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(f"TensorRT could not load {plan}: {self._log.last()}")
        return self._keep(self._engines, engine)

    def free_engine(self, engine: int) -> None:
        """See `Seam.free_engine`."""
        self._kernels.pop(engine, None)
        del self._engines[engine]

    def tensors(self, engine: int) -> tuple[TensorInfo, ...]:
        """See `Seam.tensors`."""
        it = self._engines[engine]
        names = [it.get_tensor_name(index) for index in range(it.num_io_tensors)]
        return tuple(
            TensorInfo(
                name,
                it.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT,
                it.get_tensor_dtype(name).name,
                tuple(it.get_tensor_shape(name)),
            )
            for name in names
        )

    def alias(self, engine: int, output: str) -> str | None:
        """See `Seam.alias`."""
        name = self._engines[engine].get_aliased_input_tensor(output)
        return None if name is None else str(name)

    def max_shape(self, engine: int, name: str, profile: int) -> tuple[int, ...]:
        """See `Seam.max_shape`."""
        return tuple(self._engines[engine].get_tensor_profile_shape(name, profile)[2])

    def min_shape(self, engine: int, name: str, profile: int) -> tuple[int, ...]:
        """See `Seam.min_shape`."""
        return tuple(self._engines[engine].get_tensor_profile_shape(name, profile)[0])

    def scratch_bytes(self, engine: int, profile: int) -> int:
        """See `Seam.scratch_bytes`."""
        return int(self._engines[engine].get_device_memory_size_for_profile_v2(profile))

    def new_context(self, engine: int, profile: int, stream: int, *, fixed_shape: bool) -> int:
        """See `Seam.new_context`."""
        it, trt = self._engines[engine], self._trt
        how = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._rtx:
            config = it.create_runtime_config()
            config.set_execution_context_allocation_strategy(how)
            if fixed_shape:
                # A captured graph keeps its kernels: not those that stand in while others compile.
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
            if engine not in self._kernels:
                self._kernels[engine] = config.create_runtime_cache()
            config.set_runtime_cache(self._kernels[engine])
            context = it.create_execution_context(config)
        else:
            context = it.create_execution_context(how)
        if context is None:
            raise BackendError(f"TensorRT could not create a context: {self._log.last()}")
        self._require(context.set_optimization_profile_async(profile, stream), "set a profile")
        return self._keep(self._contexts, context)

    def free_context(self, context: int) -> None:
        """See `Seam.free_context`."""
        del self._contexts[context]

    def set_scratch(self, context: int, address: int, num_bytes: int) -> None:
        """See `Seam.set_scratch`."""
        self._contexts[context].set_device_memory(address, num_bytes)

    def set_shape(self, context: int, name: str, shape: Sequence[int]) -> None:
        """See `Seam.set_shape`."""
        done = self._contexts[context].set_input_shape(name, tuple(shape))
        self._require(done, f"give {name} the shape {tuple(shape)}")

    def set_address(self, context: int, name: str, address: int) -> None:
        """See `Seam.set_address`."""
        self._require(self._contexts[context].set_tensor_address(name, address), f"bind {name}")

    def missing(self, context: int) -> tuple[str, ...]:
        """See `Seam.missing`."""
        it = self._contexts[context]
        unknown = it.infer_shapes()
        unbound = [
            name
            for name in (it.engine.get_tensor_name(i) for i in range(it.engine.num_io_tensors))
            if not it.get_tensor_address(name)
        ]
        return tuple(dict.fromkeys([*unknown, *unbound]))

    def capturable(self, context: int, stream: int) -> bool:
        """See `Seam.capturable`. Enterprise TensorRT cannot be asked: True."""
        return not self._rtx or bool(self._contexts[context].is_stream_capturable(stream))

    def enqueue(self, context: int, stream: int) -> None:
        """See `Seam.enqueue`."""
        self._require(self._contexts[context].execute_async_v3(stream), "run the engine")

    def begin_capture(self, stream: int) -> None:
        """See `Seam.begin_capture`."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """See `Seam.end_capture`."""
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._keep(self._graphs, self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._call("cudaGraphDestroy", graph)

    def abort_capture(self, stream: int) -> None:
        """See `Seam.abort_capture`. A failure has often ended the capture with an error already."""
        error, graph = self._cuda.cudaStreamEndCapture(stream)
        if error == self._cuda.cudaError_t.cudaSuccess:
            self._call("cudaGraphDestroy", graph)
        self._cuda.cudaGetLastError()

    def launch(self, graph: int, stream: int) -> None:
        """See `Seam.launch`."""
        self._call("cudaGraphLaunch", self._graphs[graph], stream)

    def free_graph(self, graph: int) -> None:
        """See `Seam.free_graph`."""
        self._call("cudaGraphExecDestroy", self._graphs.pop(graph))

    def _trt_runtime(self) -> Any:
        if self._runtime is None:
            self._runtime = self._trt.Runtime(self._log)
        return self._runtime

    def _require(self, done: bool, what: str) -> None:
        if not done:
            raise BackendError(f"TensorRT could not {what}: {self._log.last()}")

    def _keep(self, where: dict[int, Any], thing: Any) -> int:
        handle, self._next = self._next, self._next + 1
        where[handle] = thing
        return handle


def _logger(trt: Any) -> Any:
    """A logger that remembers the last error: calls of TensorRT only say that they failed."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self._last = message.strip()

        def last(self) -> str:
            return self._last or "it gave no reason"

    return Log()
