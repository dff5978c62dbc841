"""From a bundle to a proven runner on ONNX Runtime's CUDA provider."""

from __future__ import annotations

from qwen_runtime.backends.cuda.nvidia import load_seam
from qwen_runtime.backends.cuda.runner import CudaRunner
from qwen_runtime.backends.cuda.seam import CudaSeam
from qwen_runtime.backends.proof import Claim, prove
from qwen_runtime.backends.versions import require_version
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_description import LOWERED_FILE
from qwen_runtime.lowered_file import LoweredFolder

__all__ = ["claim_of", "open_cuda"]


def open_cuda(bundle: Bundle, *, proved: bool = True) -> CudaRunner:
    """Load a bundle's graphs for CUDA, and prove them where they were never run.

    Args:
        bundle: An opened bundle.
        proved: Prove them; otherwise they may answer wrongly.

    Raises:
        BackendError: If ONNX Runtime with CUDA, a driver or a GPU is missing, the graphs cannot run
            here, memory is short, or they answer otherwise than the original.
        BundleError: If the bundle has no graphs for CUDA, they are damaged, or there is nothing to
            prove them with.
    """
    folder = LoweredFolder.open(bundle, "cuda")
    seam = load_seam()
    version = seam.onnxruntime.__version__
    require_version(version, folder.description.minimum_engine_versions.get("onnxruntime"), "cuda")
    runner = CudaRunner(bundle, folder, seam)
    if not proved:
        return runner
    try:
        prove(runner, bundle, _claim(folder, seam), runner.device)
    except BaseException:
        runner.close()
        raise
    return runner


def claim_of(bundle: Bundle) -> Claim:
    """What a bundle's graphs claim on this machine: that they answer like the original.

    Raises:
        BackendError: If ONNX Runtime with CUDA is missing.
        BundleError: If the bundle has no graphs for CUDA, or they are damaged.
    """
    return _claim(LoweredFolder.open(bundle, "cuda"), load_seam())


def _claim(folder: LoweredFolder, seam: CudaSeam) -> Claim:
    return Claim(
        document=folder.path / LOWERED_FILE,
        compute_dtype=folder.description.compute_dtype,
        software=f"onnxruntime {seam.onnxruntime.__version__} cuda",
        check_hashes=folder.check_hashes,
        room="--max-context",
        advice=f"do not use these graphs: make them again ({folder.remake_command}), or use "
        "device='cpu'",
        backend="onnxruntime",
        driver=seam.cuda_versions()[0],
    )
