"""What the CUDA runner needs of CUDA and of ONNX Runtime's CUDA provider.

`qwen_runtime.backends.cuda.nvidia` is the implementation. Everything above it takes the device as
a parameter: with a seam whose device is the host's memory and whose provider is the CPU's, the same
code runs, sessions and all. Memory and streams are `qwen_runtime.backends.device_seam`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qwen_runtime.backends.device_seam import DeviceSeam

__all__ = ["NO_GRAPH", "CudaSeam", "Provider"]

Provider = tuple[str, Mapping[str, str]]
"""An execution provider's name and options, as `onnxruntime.InferenceSession` takes them."""

NO_GRAPH = -1
"""In place of a graph's number: run without capturing (ONNX Runtime's own value for that)."""


class CudaSeam(DeviceSeam, Protocol):
    """CUDA and ONNX Runtime on one device."""

    @property
    def onnxruntime(self) -> Any:
        """The module."""

    @property
    def device_type(self) -> str:
        """ONNX Runtime's name of where tensors are bound: "cuda"."""

    @property
    def dlpack_device(self) -> int:
        """DLPack's number for the same."""

    def providers(self, stream: int, *, capture: bool, tf32: bool) -> Sequence[Provider]:
        """What a session runs on.

        Args:
            stream: The stream of all its work.
            capture: Whether its runs may be captured in CUDA graphs.
            tf32: Whether float32 products may be rounded to 10 bits of mantissa.
        """

    def session_options(self, *, allow_cpu: bool = False) -> Any:
        """New onnxruntime.SessionOptions.

        Args:
            allow_cpu: Let nodes without a kernel on the device run on the CPU; otherwise opening
                such a session fails.
        """

    def run(self, session: Any, binding: Any, stream: int, graph: int) -> None:
        """Queue a session's run after what the stream holds.

        Args:
            session: An onnxruntime.InferenceSession.
            binding: Its inputs and outputs, an onnxruntime.IOBinding.
            stream: The one that the session was opened with.
            graph: `NO_GRAPH`, or a number >= 1: captured in a CUDA graph when it is met for the
                first time, launched from then on, with the addresses it was captured with.

        Raises:
            BackendError: With ONNX Runtime's own words, if it fails.
            DeviceMemoryError: If there is not enough memory for it.
        """

    def release_graph(self, session: Any, graph: int) -> None:
        """Destroy a session's captured graph; nothing may be pending."""
