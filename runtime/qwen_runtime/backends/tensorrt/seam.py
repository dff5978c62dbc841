"""What the runner needs of TensorRT and CUDA, one method for one call of theirs.

`qwen_runtime.backends.tensorrt.nvidia` is the implementation. Addresses and handles are integers,
sizes are bytes. Work given to a stream runs in order and is done only after `Seam.synchronise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import BackendError

__all__ = ["DeviceInfo", "DeviceMemoryError", "Seam", "TensorInfo"]


class DeviceMemoryError(BackendError):
    """The device, or the host's page-locked memory, has no room for an allocation."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The GPU in use."""

    name: str
    sm: int
    """Compute capability: 89 is 8.9."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of an engine."""

    name: str
    is_input: bool
    dtype: str
    """TensorRT's name of it: "INT64", "FLOAT", "BF16", "HALF"."""
    shape: tuple[int, ...]
    """-1 where a profile gives the size."""


class Seam(Protocol):
    """TensorRT and CUDA on one device."""

    @property
    def flavour(self) -> str:
        """Which TensorRT: "tensorrt-rtx" or "tensorrt"."""

    @property
    def version(self) -> str:
        """TensorRT's release, "1.7.1.116"."""

    def cuda_versions(self) -> tuple[int, int]:
        """The newest CUDA that the driver serves, 0 without one, and the runtime's: 13050 is 13.5."""

    def device(self) -> DeviceInfo:
        """The GPU in use.

        Raises:
            BackendError: If CUDA finds none.
        """

    def free_bytes(self) -> int:
        """Device memory that is free."""

    # --- engines and contexts -------------------------------------------------------------------

    def validity(self, plan: Path) -> tuple[str, ...]:
        """Why a plan cannot run here, in TensorRT's words ("MALFORMED_ENGINE"); empty if it can."""

    def load(self, plan: Path) -> int:
        """Deserialise a plan; its weights go to the device.

        Raises:
            BackendError: With TensorRT's own words, if it fails.
        """

    def free_engine(self, engine: int) -> None:
        """Destroy an engine whose contexts are gone."""

    def tensors(self, engine: int) -> tuple[TensorInfo, ...]:
        """Inputs and outputs."""

    def alias(self, engine: int, output: str) -> str | None:
        """The input that an output shares its memory with; None if it has its own."""

    def max_shape(self, engine: int, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape of an input under a profile."""

    def min_shape(self, engine: int, name: str, profile: int) -> tuple[int, ...]:
        """The smallest shape of an input under a profile."""

    def scratch_bytes(self, engine: int, profile: int) -> int:
        """Scratch memory that a context of a profile needs."""

    def new_context(self, engine: int, profile: int, stream: int, *, fixed_shape: bool) -> int:
        """Create an execution context without scratch memory and set its profile.

        Args:
            engine: From `load`.
            profile: Number of the profile.
            stream: The stream it will run on.
            fixed_shape: It meets few shapes, so that kernels made for each are worth waiting for.
        """

    def free_context(self, context: int) -> None:
        """Destroy a context; the graphs captured in it must be gone."""

    def set_scratch(self, context: int, address: int, num_bytes: int) -> None:
        """Give a context its scratch memory, 256-byte aligned."""

    def set_shape(self, context: int, name: str, shape: Sequence[int]) -> None:
        """Set an input's shape.

        Raises:
            BackendError: If it is outside of the profile.
        """

    def set_address(self, context: int, name: str, address: int) -> None:
        """Set where a tensor lies on the device."""

    def missing(self, context: int) -> tuple[str, ...]:
        """Tensors whose shape or address is not known yet."""

    def capturable(self, context: int, stream: int) -> bool:
        """Whether `enqueue` may be captured in a graph."""

    def enqueue(self, context: int, stream: int) -> None:
        """Run the engine after what the stream holds.

        Raises:
            BackendError: With TensorRT's own words, if it fails.
        """

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
        self, target: int, source: int, *, pitch: int, width: int, height: int, stream: int
    ) -> None:
        """Copy ``height`` runs of ``width`` bytes, ``pitch`` bytes apart on both sides."""

    # --- streams and graphs ---------------------------------------------------------------------

    def new_stream(self) -> int:
        """Create a stream that does not wait for the default one."""

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""

    def synchronise(self, stream: int) -> None:
        """Wait until all work of a stream is done."""

    def begin_capture(self, stream: int) -> None:
        """Record what the stream is given from now on, instead of running it."""

    def end_capture(self, stream: int) -> int:
        """End recording; returns a graph that `launch` runs."""

    def abort_capture(self, stream: int) -> None:
        """End recording and drop what was recorded, after a failure."""

    def launch(self, graph: int, stream: int) -> None:
        """Run a graph after what the stream holds."""

    def free_graph(self, graph: int) -> None:
        """Destroy a graph."""
