"""Weights on the device: once for all sessions, brought there through page-locked memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.cuda.dlpack import tensor_at
from qwen_runtime.backends.cuda.seam import CudaSeam
from qwen_runtime.backends.device_memory import DeviceMemory, aligned
from qwen_runtime.backends.device_seam import DeviceMemoryError
from qwen_runtime.backends.lowered_contents import initializer_bytes, pieces
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError
from qwen_runtime.lowered_file import LoweredFolder

__all__ = ["DeviceWeights"]

STAGING_BYTES = 16 << 20
"""Of each of the two staging areas: while one is copied to the device, the other is filled."""


class DeviceWeights:
    """All initialisers of a bundle's lowered graphs.

    Attributes:
        values: Name to onnxruntime.OrtValue over the device's memory.
        num_bytes: Bytes of them all on the device.

    Args:
        seam: CUDA and ONNX Runtime.
        memory: Where they are allocated; they are freed with it.
        stream: What copies run on.
        bundle: The bundle whose weights they are.
        folder: Its lowered graphs.

    Raises:
        BackendError: If there is not enough memory, or a number does not fit the graphs' type.
        BundleError: If the description does not fit the weights.
    """

    def __init__(
        self,
        seam: CudaSeam,
        memory: DeviceMemory,
        stream: int,
        bundle: Bundle,
        folder: LoweredFolder,
    ) -> None:
        entries = folder.description.initializers
        self.num_bytes = sum(aligned(initializer_bytes(entry)) for entry in entries)
        self.values: Mapping[str, Any] = {}
        if not entries:
            return
        try:
            address = memory.allocate(self.num_bytes)
            staging = _Staging(seam, memory, stream)
        except DeviceMemoryError as error:
            raise BackendError(
                f"{folder.path} needs {self.num_bytes} bytes of GPU memory for its weights and "
                f"{2 * STAGING_BYTES} of page-locked memory to bring them there, got "
                f"{seam.free_bytes()} free ones on the GPU; free GPU memory, or build the bundle "
                "with --precision int8 or int4"
            ) from error
        weights = bundle.file(bundle.manifest.weights.file)
        values: dict[str, Any] = {}
        for entry in entries:
            offset = address
            for piece in pieces(entry, weights):
                staging.put(offset, piece.reshape(-1).view(np.uint8))
                offset += piece.nbytes
            values[entry.name] = tensor_at(
                seam.onnxruntime, address, entry.shape, entry.dtype, seam.dlpack_device
            )
            address += aligned(initializer_bytes(entry))
        staging.close()
        self.values = values

    def close(self) -> None:
        """Let go of the tensors; no session may use them any more."""
        self.values = {}


class _Staging:
    """Two page-locked areas that bytes pass through in turn."""

    def __init__(self, seam: CudaSeam, memory: DeviceMemory, stream: int) -> None:
        self._seam, self._memory, self._stream = seam, memory, stream
        self._address = memory.allocate_host(2 * STAGING_BYTES)
        self._second = False

    def put(self, target: int, content: npt.NDArray[np.uint8]) -> None:
        """Copy bytes to the device."""
        for start in range(0, math.prod(content.shape), STAGING_BYTES):
            block = content[start : start + STAGING_BYTES]
            area = self._address + self._second * STAGING_BYTES
            self._memory.view(area, block.shape, np.uint8)[:] = block
            # What the other area held has arrived by now or is waited for; this one is queued next.
            self._seam.synchronise(self._stream)
            self._seam.to_device(target + start, area, block.size, self._stream)
            self._second = not self._second

    def close(self) -> None:
        """Wait for the last copy and free the areas."""
        self._seam.synchronise(self._stream)
        self._memory.free_host(self._address)
