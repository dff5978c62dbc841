"""What was found on a machine: data alone, so that any machine can be described and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "CacheFolder",
    "Cpu",
    "Cuda",
    "Gpu",
    "Machine",
    "Memory",
    "OnnxRuntime",
    "Package",
    "TensorRT",
    "Trial",
]


@dataclass(frozen=True, slots=True)
class Trial:
    """Something that was done, to see whether it works."""

    ok: bool
    seconds: float
    error: str | None = None
    """Why it did not work; None where it did."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor."""

    model: str
    cores: int
    """Those that this process may use."""
    features: tuple[str, ...]
    """Instruction sets that matrix kernels are written for: "AVX2", ...; empty where the system
    does not tell."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes; None where the system does not tell."""

    total_bytes: int | None
    available_bytes: int | None
    """What a new process can have without swapping, a container's limit included."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package that qwen-export asks for."""

    name: str
    installed: str | None
    """Its version; None where it is not installed."""
    wanted: str
    """Versions asked for: ">=1.31,<1.32"; empty for any."""
    extras: tuple[str, ...] = ()
    """Extras of qwen-export that bring it; none for what is always installed."""


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """ONNX Runtime, as it imports."""

    distributions: tuple[str, ...]
    """Installed packages that hold the module: there must be one, or they overwrite each other."""
    version: str | None = None
    """None where it cannot be imported."""
    providers: tuple[str, ...] = ()
    """Execution providers that it was built with."""
    runs_cpu: bool = False
    """Whether a session computed an attention of opset 24 correctly on the CPU."""
    runs_cuda: bool = False
    """The same on a GPU, with nothing falling back to the CPU."""
    error: str | None = None
    """What ended these trials early."""


@dataclass(frozen=True, slots=True)
class TensorRT:
    """One flavour of TensorRT, as it imports."""

    version: str | None = None
    """None where it cannot be imported."""
    sms: tuple[int, ...] = ()
    """GPU generations that it builds for on any machine; empty if only for the GPU at hand."""
    builds: bool = False
    """Whether a builder made a small engine."""
    runs: bool = False
    """Whether that engine was loaded on a GPU."""
    missing: str | None = None
    """The module that is not installed."""
    error: str | None = None
    """What ended these trials early."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    sm: int
    """Compute capability: 89 for 8.9."""
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Cuda:
    """The NVIDIA driver, its GPUs, and CUDA libraries."""

    source: str | None = None
    """Who told: "cuda-bindings", "nvidia-smi" or "/proc"; None where none found a driver."""
    driver: str | None = None
    """Release of the driver, "580.65.06", where it is known."""
    cuda_version: int | None = None
    """Newest CUDA that the driver serves: 13000 for 13.0."""
    gpus: tuple[Gpu, ...] = ()
    bindings: bool = False
    """Whether the package cuda-bindings can be imported; engines run through it."""
    libraries: Mapping[str, str | None] = field(default_factory=dict)
    """CUDA library to the file it was loaded from, None where there is none; empty where nobody
    looked, which takes cuda-bindings."""
    error: str | None = None
    """What the driver answered, where it failed."""


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """A folder of things that can be made or fetched again."""

    path: str
    holds: str
    num_bytes: int
    writable: bool
    """Whether it, or the nearest folder above it that exists, can be written to."""
    variable: str
    """The environment variable that chooses another."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that `qwen_export.doctor` looks at."""

    version: str
    """Of qwen-export."""
    os: str
    python: str
    cpu: Cpu
    memory: Memory
    packages: tuple[Package, ...]
    onnxruntime: OnnxRuntime
    tensorrt_rtx: TensorRT
    tensorrt: TensorRT
    cuda: Cuda
    build: Trial
    """A model of one layer was built and compared with PyTorch."""
    grammar: Trial
    """A grammar was compiled."""
    caches: tuple[CacheFolder, ...] = ()

    def installed(self, package: str) -> str | None:
        """Version of a package that qwen-export asks for, or None."""
        return next((each.installed for each in self.packages if each.name == package), None)
