"""What the runner needs of TensorRT and CUDA, one method for one call of theirs.

`qwen_runtime.backends.tensorrt.nvidia` is the implementation. Addresses and handles are integers,
sizes are bytes. Memory and streams are `qwen_runtime.backends.device_seam`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_runtime.backends.device_seam import DeviceInfo, DeviceMemoryError, DeviceSeam

__all__ = ["DeviceInfo", "DeviceMemoryError", "Seam", "TensorInfo"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of an engine."""

    name: str
    is_input: bool
    dtype: str
    """TensorRT's name of it: "INT64", "FLOAT", "BF16", "HALF"."""
    shape: tuple[int, ...]
    """-1 where a profile gives the size."""


class Seam(DeviceSeam, Protocol):
    """TensorRT and CUDA on one device."""

    @property
    def flavour(self) -> str:
        """Which TensorRT: "tensorrt-rtx" or "tensorrt"."""

    @property
    def version(self) -> str:
        """TensorRT's release, "1.7.1.116"."""

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

    # --- graphs ---------------------------------------------------------------------------------

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
