"""Which runner serves a backend and a device."""

from __future__ import annotations

from qwen_runtime.backends.base import ModelRunner
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import RequestError

__all__ = ["DEVICES", "check_backend", "open_runner"]

DEVICES = {"onnxruntime": ("cpu", "cuda"), "tensorrt": ("cuda",)}
"""Backend to the devices it runs on, its own choice first."""


def check_backend(backend: object, device: object, threads: object = None) -> None:
    """Refuse what no runner serves.

    Args:
        backend: A key of `DEVICES`.
        device: One of its devices, or None for its own choice.
        threads: None unless it computes on the CPU.

    Raises:
        RequestError: Naming the argument.
    """
    if not isinstance(backend, str) or backend not in DEVICES:
        names = " or ".join(f'"{name}"' for name in DEVICES)
        raise RequestError(f"backend must be {names}, got {backend!r}", param="backend")
    devices = DEVICES[backend]
    if device is not None and device not in devices:
        names = " or ".join(f'"{name}"' for name in devices)
        raise RequestError(
            f'device must be {names} for backend "{backend}", got {device!r}', param="device"
        )
    if threads is not None and (device or devices[0]) != "cpu":
        raise RequestError(
            f'threads must be None for backend "{backend}", which computes on the GPU, got '
            f"{threads!r}"
            if "cpu" not in devices
            else f'threads must be None for device "cuda", got {threads!r}',
            param="threads",
        )


def open_runner(
    bundle: Bundle,
    *,
    backend: str = "onnxruntime",
    device: str | None = None,
    threads: int | None = None,
    proved: bool = True,
) -> ModelRunner:
    """Open a bundle on a backend.

    Args:
        bundle: An opened bundle.
        backend: A key of `DEVICES`.
        device: One of its devices; None for its own choice.
        threads: Threads for one operator on the CPU; None for one per core.
        proved: Refuse what was made for a GPU until it has answered there like the original;
            otherwise it is opened as it is, to be measured.

    Returns:
        A runner; its caller closes it.

    Raises:
        RequestError: If an argument is wrong.
        BackendError: If the backend is missing or cannot run the bundle.
        BundleError: If the bundle lacks what the backend needs, or it is damaged.
    """
    check_backend(backend, device, threads)
    if backend == "tensorrt":
        from qwen_runtime.backends.tensorrt import open_tensorrt  # not needed on the CPU

        return open_tensorrt(bundle, proved=proved)
    if device == "cuda":
        from qwen_runtime.backends.cuda import open_cuda  # not needed on the CPU

        return open_cuda(bundle, proved=proved)
    return OnnxRuntimeRunner(bundle, threads=threads)
