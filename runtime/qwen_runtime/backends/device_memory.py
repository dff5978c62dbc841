"""What was allocated through the seam, so that all of it is freed whatever happens."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.device_seam import DeviceSeam

__all__ = ["ALIGNMENT", "DeviceMemory", "aligned"]

ALIGNMENT = 256
"""Bytes; addresses given to TensorRT are multiples of it (its documentation of tensor addresses)."""


class DeviceMemory:
    """Allocations on the device and of page-locked memory of the host.

    Args:
        seam: Where they are made.
    """

    def __init__(self, seam: DeviceSeam) -> None:
        self._seam = seam
        self._device: dict[int, int] = {}
        self._host: dict[int, int] = {}

    @property
    def device_bytes(self) -> int:
        """Bytes allocated on the device now."""
        return sum(self._device.values())

    def allocate(self, num_bytes: int) -> int:
        """Allocate device memory; its content is undefined.

        Raises:
            DeviceMemoryError: If there is not enough.
        """
        address = self._seam.malloc(num_bytes)
        self._device[address] = num_bytes
        return address

    def free(self, address: int) -> None:
        """Free device memory; no work that uses it may be pending."""
        del self._device[address]
        self._seam.free(address)

    def allocate_host(self, num_bytes: int) -> int:
        """Allocate page-locked memory.

        Raises:
            DeviceMemoryError: If there is not enough.
        """
        address = self._seam.host_malloc(num_bytes)
        self._host[address] = num_bytes
        return address

    def free_host(self, address: int) -> None:
        """Free page-locked memory; views of it are void."""
        del self._host[address]
        self._seam.host_free(address)

    def view(
        self, address: int, shape: tuple[int, ...], dtype: npt.DTypeLike
    ) -> npt.NDArray[np.generic]:
        """An array over page-locked memory from ``address`` on."""
        dtype = np.dtype(dtype)
        num_bytes = dtype.itemsize * int(np.prod(shape))
        return self._seam.host_view(address, num_bytes).view(dtype).reshape(shape)

    def close(self) -> None:
        """Free everything; where one cannot be freed, still all others."""
        with ExitStack() as frees:
            for address in self._device:
                frees.callback(self.free, address)
            for address in self._host:
                frees.callback(self.free_host, address)


def aligned(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
