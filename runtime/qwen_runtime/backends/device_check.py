"""Whether there is a GPU to compute on."""

from __future__ import annotations

from qwen_runtime.backends.device_seam import DeviceInfo, DeviceSeam
from qwen_runtime.errors import BackendError

__all__ = ["require_gpu"]


def require_gpu(seam: DeviceSeam, purpose: str, otherwise: str) -> DeviceInfo:
    """The GPU in use.

    Args:
        seam: CUDA.
        purpose: What it is for, after "is needed to".
        otherwise: What to do without one, after "or".

    Raises:
        BackendError: If there is none, no driver, or one that is too old.
    """
    driver, runtime = seam.cuda_versions()
    if not driver:
        raise BackendError(
            f"an NVIDIA driver for CUDA {runtime // 1000} is needed to {purpose}, got none; "
            f"install one, or {otherwise}"
        )
    if driver // 1000 < runtime // 1000:
        raise BackendError(
            f"the NVIDIA driver must serve CUDA {runtime // 1000}, got one for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}; update the driver, or {otherwise}"
        )
    try:
        return seam.device()
    except BackendError as error:
        raise BackendError(
            f"a CUDA GPU is needed to {purpose}: {error}; check CUDA_VISIBLE_DEVICES, or "
            f"{otherwise}"
        ) from error
