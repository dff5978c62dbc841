"""CUDA's memory and streams, through ``cuda.bindings.runtime``.

No logic: what is done with a call stands above this module, where it is tested without a GPU. Of
this module only what works without a driver has been executed.

Source: CUDA Runtime API 13.
"""

from __future__ import annotations

import ctypes
import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.device_seam import DeviceInfo, DeviceMemoryError
from qwen_runtime.errors import BackendError

__all__ = ["NvidiaDevice", "import_for"]

_DEVICE = 0
"""The first GPU that CUDA_VISIBLE_DEVICES leaves visible."""


def import_for(module: str, purpose: str, extra: str) -> ModuleType:
    """Import a module that an extra brings.

    Args:
        module: Its name.
        purpose: What it is needed for, after "must be installed to".
        extra: The extra.

    Raises:
        BackendError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(
            f"{module} must be installed to {purpose} ({error}): pip install 'qwen-export[{extra}]'"
        ) from error


class NvidiaDevice:
    """See `qwen_runtime.backends.device_seam.DeviceSeam`.

    Args:
        cuda: The module ``cuda.bindings.runtime``.
    """

    def __init__(self, cuda: ModuleType) -> None:
        self._cuda: Any = cuda

    def cuda_versions(self) -> tuple[int, int]:
        """See `DeviceSeam.cuda_versions`."""
        versions = (self._call("cudaDriverGetVersion"), self._call("cudaRuntimeGetVersion"))
        return int(versions[0]), int(versions[1])

    def device(self) -> DeviceInfo:
        """See `DeviceSeam.device`."""
        if not self._call("cudaGetDeviceCount"):
            raise BackendError("CUDA finds no GPU")
        self._call("cudaSetDevice", _DEVICE)
        kinds = self._cuda.cudaDeviceAttr
        wanted = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        major, minor = (self._call("cudaDeviceGetAttribute", kind, _DEVICE) for kind in wanted)
        name = self._call("cudaGetDeviceProperties", _DEVICE).name
        return DeviceInfo(name.decode().rstrip("\0"), 10 * int(major) + int(minor))

    def free_bytes(self) -> int:
        """See `DeviceSeam.free_bytes`."""
        return int(self._call("cudaMemGetInfo")[0])

    def malloc(self, num_bytes: int) -> int:
        """See `DeviceSeam.malloc`."""
        return int(self._call("cudaMalloc", num_bytes))

    def free(self, address: int) -> None:
        """See `DeviceSeam.free`."""
        self._call("cudaFree", address)

    def host_malloc(self, num_bytes: int) -> int:
        """See `DeviceSeam.host_malloc`."""
        return int(self._call("cudaMallocHost", num_bytes))

    def host_free(self, address: int) -> None:
        """See `DeviceSeam.host_free`."""
        self._call("cudaFreeHost", address)

    def host_view(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """See `DeviceSeam.host_view`."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        """See `DeviceSeam.zero`."""
        self._call("cudaMemsetAsync", address, 0, num_bytes, stream)

    def to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """See `DeviceSeam.to_device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, num_bytes, kind, stream)

    def to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """See `DeviceSeam.to_host`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, num_bytes, kind, stream)

    def on_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """See `DeviceSeam.on_device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpyAsync", target, source, num_bytes, kind, stream)

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
        """See `DeviceSeam.on_device_2d`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        apart = source_pitch or pitch
        self._call("cudaMemcpy2DAsync", target, pitch, source, apart, width, height, kind, stream)

    def new_stream(self) -> int:
        """See `DeviceSeam.new_stream`."""
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def free_stream(self, stream: int) -> None:
        """See `DeviceSeam.free_stream`."""
        self._call("cudaStreamDestroy", stream)

    def synchronise(self, stream: int) -> None:
        """See `DeviceSeam.synchronise`."""
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call CUDA: its one result, a tuple of several, or None."""
        error, *results = getattr(self._cuda, name)(*arguments)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()  # or later calls would report it again
            raise DeviceMemoryError(f"{name} failed: {self._words(error)}")
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise BackendError(f"{name} failed: {self._words(error)}")
        return results[0] if len(results) == 1 else tuple(results)

    def _words(self, error: Any) -> str:
        text = self._cuda.cudaGetErrorString(error)[1]
        return f"{error.name}, {text.decode() if isinstance(text, bytes) else text}"
