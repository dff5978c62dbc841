"""What every runner on a GPU needs of CUDA, one method for one call of its.

`qwen_runtime.backends.nvidia_device` is the implementation. Addresses and handles are integers,
sizes are bytes. Work given to a stream runs in order and is done only after
`DeviceSeam.synchronise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import BackendError

__all__ = ["DeviceInfo", "DeviceMemoryError", "DeviceSeam"]


class DeviceMemoryError(BackendError):
    """The device, or the host's page-locked memory, has no room for an allocation."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The GPU in use."""

    name: str
    sm: int
    """Compute capability: 89 is 8.9."""


class DeviceSeam(Protocol):
    """Memory and streams of one device."""

    def cuda_versions(self) -> tuple[int, int]:
        """The newest CUDA that the driver serves, 0 without one, and the runtime's: 13050 is 13.5."""

    def device(self) -> DeviceInfo:
        """The GPU in use.

        Raises:
            BackendError: If CUDA finds none.
        """

    def free_bytes(self) -> int:
        """Device memory that is free."""

    # --- memory ---------------------------------------------------------------------------------

    def malloc(self, num_bytes: int) -> int:
        """Allocate device memory, 256-byte aligned, with whatever it holds.

        Raises:
            DeviceMemoryError: If there is not enough.
        """

    def free(self, address: int) -> None:
        """Free device memory."""

    def host_malloc(self, num_bytes: int) -> int:
        """Allocate page-locked memory of the host.

        Raises:
            DeviceMemoryError: If there is not enough.
        """

    def host_free(self, address: int) -> None:
        """Free page-locked memory; nobody may hold a view of it."""

    def host_view(self, address: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Page-locked memory as an array; a view, not a copy."""

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        """Set device memory to zero."""

    def to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Copy from page-locked memory to the device."""

    def to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Copy from the device to page-locked memory."""

    def on_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Copy on the device."""

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
        """Copy ``height`` runs of ``width`` bytes, ``pitch`` bytes apart.

        Args:
            target: Where the first run goes.
            source: Where the first run lies; no run may overlap its target.
            pitch: From one run to the next at the target, and at the source.
            width: Bytes of a run.
            height: Runs.
            stream: What the copy runs on.
            source_pitch: From one run to the next at the source, where it is another.
        """

    # --- streams -------------------------------------------------------------------------------

    def new_stream(self) -> int:
        """Create a stream that does not wait for the default one."""

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""

    def synchronise(self, stream: int) -> None:
        """Wait until all work of a stream is done."""
