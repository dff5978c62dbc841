"""The two TensorRTs: what differs between them, in one place.

`tensorrt-rtx` builds without a GPU for any of the GPUs it knows. `tensorrt`, the enterprise one,
builds for the GPU at hand; nothing here has ever been run with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from qwen_export.errors import TargetError
from qwen_runtime.engine_description import Flavour

__all__ = ["ALL_SMS", "FLAVOURS", "Target", "load_target", "select_sms", "set_sms"]

ALL_SMS = (80, 86, 89, 120, 121)
"""GPU generations one plan serves; more of them cost bytes, not time."""


@dataclass(frozen=True, slots=True)
class Target:
    """One TensorRT, installed."""

    flavour: Flavour
    module: ModuleType

    @property
    def version(self) -> str:
        """Its release, "1.7.1.116"."""
        return str(self.module.__version__)


@dataclass(frozen=True, slots=True)
class _Package:
    module: str
    extra: str
    versions: tuple[str, ...]
    """Beginnings of the releases that are supported."""


_PACKAGES: dict[Flavour, _Package] = {
    "tensorrt-rtx": _Package("tensorrt_rtx_bindings", "tensorrt-rtx", ("1.7.",)),
    "tensorrt": _Package("tensorrt", "tensorrt", ("11.",)),
}
FLAVOURS: tuple[Flavour, ...] = tuple(_PACKAGES)
"""The names users know."""


def load_target(name: str) -> Target:
    """Import a TensorRT.

    Args:
        name: "tensorrt-rtx" or "tensorrt".

    Raises:
        TargetError: If there is no such target, it is not installed, or it is of a release this
            was not written for.
    """
    for flavour, package in _PACKAGES.items():
        if flavour == name:
            return _load(flavour, package)
    raise TargetError(f"--target must be one of {', '.join(FLAVOURS)}, got {name}", names=[name])


def _load(flavour: Flavour, package: _Package) -> Target:
    try:
        module = importlib.import_module(package.module)
    except ImportError as error:
        raise TargetError(
            f"--target {flavour} needs {package.module}, which cannot be imported ({error}); "
            f"install it with pip install 'qwen-export[{package.extra}]'",
            names=[flavour],
        ) from error
    target = Target(flavour, module)
    if not target.version.startswith(package.versions):
        wanted = " or ".join(f"{version}x" for version in package.versions)
        raise TargetError(
            f"--target {flavour} needs release {wanted} of {package.module}, got "
            f"{target.version}; install it with pip install 'qwen-export[{package.extra}]'",
            names=[flavour],
        )
    return target


def select_sms(target: Target, sms: Sequence[int] | None) -> tuple[int, ...]:
    """The GPU generations to build for.

    Args:
        target: From `load_target`.
        sms: What was asked for; None for all, or with the enterprise TensorRT for the GPU at
            hand.

    Raises:
        TargetError: If the target cannot build for them.
    """
    if target.flavour == "tensorrt-rtx":
        chosen = ALL_SMS if sms is None else tuple(sorted(set(sms)))
        if not chosen:
            raise TargetError("--sms must name at least one GPU generation, got none")
        _require_known(target.module, chosen)
        return chosen
    own = _gpu_sm()
    if sms is not None and tuple(sms) != (own,):
        raise TargetError(
            f"--target tensorrt builds for the GPU at hand only, SM {own}, got --sms "
            f"{','.join(map(str, sms))}; leave --sms out, or use --target tensorrt-rtx"
        )
    return (own,)


def set_sms(trt: Any, config: Any, sms: Sequence[int]) -> str | None:
    """Tell a builder's configuration which GPUs to build for; none for TensorRT's own choice.

    Returns:
        What TensorRT refuses, or None.

    Raises:
        TargetError: If this TensorRT cannot choose, or knows no such GPU.
    """
    if not sms:
        return None
    if not hasattr(trt, "ComputeCapability"):
        raise TargetError(
            f"{trt.__name__} builds for the GPU at hand only, got SM "
            f"{', '.join(map(str, sms))}; TensorRT-RTX builds for others"
        )
    _require_known(trt, sms)
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index):
            return f"SM {sm}"
    return None


def _require_known(trt: Any, sms: Sequence[int]) -> None:
    known = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    unknown = [str(sm) for sm in sms if f"SM{sm}" not in known]
    if unknown:
        raise TargetError(
            f"SM must be one of {', '.join(sorted(name[2:] for name in known))}, got "
            f"{', '.join(unknown)}",
            names=unknown,
        )


def _gpu_sm() -> int:
    """Compute capability of the first GPU: 89 for 8.9."""
    try:
        cudart: Any = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise TargetError(
            f"--target tensorrt needs a GPU and cuda-bindings ({error}); install it with pip "
            "install 'qwen-export[tensorrt]', or use --target tensorrt-rtx, which needs no GPU"
        ) from error
    attribute = cudart.cudaDeviceAttr
    numbers: list[int] = []
    for wanted in (
        attribute.cudaDevAttrComputeCapabilityMajor,
        attribute.cudaDevAttrComputeCapabilityMinor,
    ):
        status, value = cudart.cudaDeviceGetAttribute(wanted, 0)
        if status != cudart.cudaError_t.cudaSuccess:
            raise TargetError(
                f"--target tensorrt needs a GPU, but CUDA says {status.name}; use --target "
                "tensorrt-rtx, which builds without one"
            )
        numbers.append(int(value))
    return 10 * numbers[0] + numbers[1]
