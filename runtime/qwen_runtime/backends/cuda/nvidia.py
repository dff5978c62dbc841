"""The seam's implementation: ONNX Runtime's CUDA provider, and ``cuda.bindings``.

No logic, as in `qwen_runtime.backends.nvidia_device`. Without a GPU only importing and the refusals
for want of a provider or a driver have been executed.

Sources: ONNX Runtime, CUDA Execution Provider (options; CUDA graphs and ``gpu_graph_id``);
onnxruntime_session_options_config_keys.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import ModuleType
from typing import Any

from qwen_runtime.backends.cuda.seam import CudaSeam, Provider
from qwen_runtime.backends.device_seam import DeviceMemoryError
from qwen_runtime.backends.nvidia_device import NvidiaDevice, import_for
from qwen_runtime.errors import BackendError

__all__ = ["OnnxRuntimeCudaSeam", "load_seam"]

_PROVIDER = "CUDAExecutionProvider"
_DLPACK_CUDA = 2
"""kDLCUDA of dlpack.h."""
_OUT_OF_MEMORY = ("Failed to allocate memory", "out of memory")
"""Of ONNX Runtime's arena, and of CUDA and its libraries."""


def load_seam() -> CudaSeam:
    """Import ONNX Runtime with its CUDA provider, and CUDA's bindings.

    Raises:
        BackendError: If one of them is not installed, or onnxruntime is the package without CUDA.
    """
    purpose = "run a bundle with device='cuda'"
    ort = import_for("onnxruntime", purpose, "cuda")
    if _PROVIDER not in ort.get_available_providers():
        raise BackendError(
            f"onnxruntime must be the package with CUDA to {purpose}, got {ort.__version__} "
            f"without {_PROVIDER}; both packages install one module, so first `pip uninstall -y "
            "onnxruntime onnxruntime-gpu`, then `pip install 'qwen-export[cuda]'`"
        )
    return OnnxRuntimeCudaSeam(ort, import_for("cuda.bindings.runtime", purpose, "cuda"))


class OnnxRuntimeCudaSeam(NvidiaDevice):
    """See `CudaSeam`.

    ONNX Runtime keeps captured graphs, and each library's workspace, for the thread that ran a
    session (``CUDAExecutionProvider::PerThreadContext``), and with CUDA graphs never gives them up.
    Steps are driven by whichever thread waits for an answer, so sessions run on one thread of the
    seam's own: a graph captured for one caller is launched and released for any other.

    Args:
        ort: The module ``onnxruntime``.
        cuda: The module ``cuda.bindings.runtime``.
    """

    device_type = "cuda"
    dlpack_device = _DLPACK_CUDA

    def __init__(self, ort: ModuleType, cuda: ModuleType) -> None:
        super().__init__(cuda)
        self.onnxruntime: Any = ort
        self._thread = ThreadPoolExecutor(1, "qwen-cuda")  # it ends with this object
        # The provider's library finds CUDA and cuDNN in their own packages only once these are
        # loaded.
        ort.preload_dlls()

    def providers(self, stream: int, *, capture: bool, tf32: bool) -> Sequence[Provider]:
        """See `CudaSeam.providers`. Memory is taken as it is needed, not in powers of two."""
        options = {
            "device_id": "0",
            "user_compute_stream": str(stream),
            "use_tf32": str(int(tf32)),
            "enable_cuda_graph": str(int(capture)),
            "arena_extend_strategy": "kSameAsRequested",
        }
        return [(_PROVIDER, options)]

    def session_options(self, *, allow_cpu: bool = False) -> Any:
        """See `CudaSeam.session_options`."""
        options = self.onnxruntime.SessionOptions()
        options.add_session_config_entry(
            "session.disable_cpu_ep_fallback", str(int(not allow_cpu))
        )
        return options

    def run(self, session: Any, binding: Any, stream: int, graph: int) -> None:
        """See `CudaSeam.run`. The session has the stream already."""
        options = self.onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        # Copies that follow are on the same stream; waiting is for `synchronise`.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._on_thread(session.run_with_iobinding, binding, options)
        except Exception as error:
            kind = (
                DeviceMemoryError
                if any(words in str(error) for words in _OUT_OF_MEMORY)
                else BackendError
            )
            raise kind(f"ONNX Runtime could not run the graph: {error}") from error

    def release_graph(self, session: Any, graph: int) -> None:
        """See `CudaSeam.release_graph`."""
        self._on_thread(session.release_captured_graph, graph)

    def _on_thread(self, call: Callable[..., object], *arguments: object) -> None:
        """Call something on the thread that runs sessions."""
        done = self._thread.submit(call, *arguments)
        # To its end also where the caller is interrupted: what it reads is freed or reused next.
        try:
            done.result()
        finally:
            wait([done])
