"""What follows from what was found on a machine. Pure: any `Machine` can be judged anywhere."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_export.doctor.machine import Gpu, Machine, Package, TensorRT
from qwen_export.doctor.versions import is_wanted

__all__ = [
    "MIN_CUDA",
    "MIN_DRIVER",
    "Capability",
    "Fault",
    "capabilities",
    "faults",
    "install_command",
    "run_cpu",
    "run_cuda",
    "run_rtx",
    "run_tensorrt",
]

MIN_CUDA, MIN_DRIVER = 13000, 580
"""CUDA 13, which TensorRT's packages are built with, and the driver release that serves it
(docs.nvidia.com/deploy/cuda-compatibility, table 1)."""
_CUDA_PROVIDER = "CUDAExecutionProvider"
_GET_DRIVER = f"install the NVIDIA driver, release {MIN_DRIVER} or newer (nvidia.com/drivers)"


@dataclass(frozen=True, slots=True)
class Capability:
    """Something the machine can or cannot do."""

    name: str
    can: bool
    why: str
    """With what it can, or why it cannot."""
    fix: str | None = None
    """What to do, a command where one is enough; None where nothing helps or nothing is wrong."""
    required: bool = False
    """Whether a machine without it is to be called unfit."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is wrong, whether or not it has stopped anything yet."""

    what: str
    fix: str


def capabilities(machine: Machine) -> tuple[Capability, ...]:
    """What a machine can build and run, each with its reason."""
    return (
        _build(machine),
        run_cpu(machine),
        _grammar(machine),
        run_cuda(machine),
        _build_rtx(machine),
        run_rtx(machine),
        run_tensorrt(machine),
    )


def faults(machine: Machine) -> tuple[Fault, ...]:
    """What is wrong with a machine's installation."""
    found = []
    holders = machine.onnxruntime.distributions
    if len(holders) > 1:
        held = " ".join(holder.split()[0] for holder in holders)
        extra = "cuda" if machine.cuda.gpus and _declares(machine, "cuda") else "cpu"
        found.append(
            Fault(
                f"{' and '.join(holders)} are both installed and overwrite each other's files",
                f"pip uninstall -y {held} && pip install 'qwen-export[{extra}]'",
            )
        )
    for package in machine.packages:
        if package.installed is not None and not is_wanted(package.installed, package.wanted):
            found.append(
                Fault(
                    f"{package.name} must be {package.wanted}, got {package.installed}",
                    install_command(machine, package.name, upgrade=True),
                )
            )
    names = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")
    versions = {version for name in names if (version := machine.installed(name)) is not None}
    if len(versions) > 1:
        found.append(
            Fault(
                "TensorRT-RTX's bindings and libraries must be of one release, got "
                + " and ".join(sorted(versions)),
                install_command(machine, names[0], upgrade=True),
            )
        )
    if (reason := _old_driver(machine)) is not None:
        found.append(Fault(reason, _GET_DRIVER))
    for cache in machine.caches:
        if not cache.writable:
            found.append(
                Fault(
                    f"{cache.path} ({cache.holds}) cannot be written to",
                    f"let this user write to it, or set {cache.variable} to another folder",
                )
            )
    return tuple(found)


def install_command(machine: Machine, package: str, *, upgrade: bool = False) -> str:
    """The pip command that brings a package: through an extra of qwen-export if one has it."""
    found = next((each for each in machine.packages if each.name == package), None)
    option = "-U " if upgrade else ""
    if found is None:
        return f"pip install {option}{package}"
    # The fullest extra: onnxruntime is in `export` too, whose user needs the rest of it.
    bracket = f"[{found.extras[0]}]" if found.extras else ""
    return f"pip install {option}'qwen-export{bracket}'"


def _declares(machine: Machine, extra: str) -> bool:
    return any(extra in package.extras for package in machine.packages)


def _absent(machine: Machine, extra: str) -> list[Package]:
    return [
        package
        for package in machine.packages
        if extra in package.extras and package.installed is None
    ]


def _build(machine: Machine) -> Capability:
    name = "build bundles"
    if machine.build.ok:
        versions = (f"{each} {machine.installed(each)}" for each in ("torch", "transformers"))
        why = f"{', '.join(versions)}: built a one-layer model and compared it with PyTorch"
        return Capability(name, True, f"{why}, {machine.build.seconds:.0f} s", required=True)
    if absent := _absent(machine, "export"):
        why = f"not installed: {', '.join(package.name for package in absent)}"
    else:
        why = f"a one-layer model could not be built: {machine.build.error}"
    fix = install_command(machine, "torch", upgrade=not absent)
    return Capability(name, False, why, fix, required=True)


def run_cpu(machine: Machine) -> Capability:
    """Whether ONNX Runtime works."""
    name, found = "run bundles on the CPU", machine.onnxruntime
    if found.runs_cpu:
        why = f"onnxruntime {found.version} computed an attention of opset 24"
        return Capability(name, True, why, required=True)
    if not found.distributions:
        why = "onnxruntime is not installed"
        return Capability(name, False, why, "pip install 'qwen-export[cpu]'", required=True)
    what = "cannot be imported" if found.version is None else f"{found.version} fails"
    return Capability(
        name,
        False,
        f"onnxruntime {what}: {found.error}",
        "pip install -U 'qwen-export[cpu]'",
        required=True,
    )


def run_cuda(machine: Machine) -> Capability:
    """Whether ONNX Runtime's CUDA provider works, which runs graphs lowered for it."""
    name, found = "run bundles on a GPU with ONNX Runtime (experimental)", machine.onnxruntime
    extra = "pip install 'qwen-export[cuda]'"
    if (refused := _no_gpu_reason(machine)) is not None:
        return Capability(name, False, *refused)
    if not found.distributions:
        return Capability(name, False, "onnxruntime is not installed", extra)
    if found.version is not None and _CUDA_PROVIDER not in found.providers:
        held = " ".join(holder.split()[0] for holder in found.distributions)
        why = f"onnxruntime {found.version} is the package without {_CUDA_PROVIDER}"
        return Capability(name, False, why, f"pip uninstall -y {held} && {extra}")
    if not machine.cuda.bindings:
        return Capability(name, False, "cuda-bindings cannot be imported", extra)
    gpu = _describe(machine.cuda.gpus[0])  # the one that the runtime takes
    if not found.runs_cuda:
        what = "cannot be imported" if found.version is None else f"{found.version} fails on {gpu}"
        fix = "pip install -U 'qwen-export[cuda]'"
        return Capability(name, False, f"onnxruntime {what}: {found.error}", fix)
    why = (
        f"onnxruntime {found.version} computed an attention on {gpu}; qwen-export was never run so"
    )
    return Capability(name, True, why)


def _grammar(machine: Machine) -> Capability:
    name, version = "hold answers to a grammar", machine.installed("llguidance")
    if machine.grammar.ok:
        return Capability(name, True, f"llguidance {version} compiled one")
    why = "llguidance is not installed"
    if version is not None:
        why = f"llguidance {version} fails: {machine.grammar.error}"
    fix = install_command(machine, "llguidance", upgrade=version is not None)
    return Capability(name, False, why, fix)


def _build_rtx(machine: Machine) -> Capability:
    name, found = "build TensorRT-RTX engines", machine.tensorrt_rtx
    if (refused := _unusable(machine, found, "TensorRT-RTX")) is not None:
        return Capability(name, False, *refused)
    if not found.builds:
        why = f"TensorRT-RTX {found.version} cannot build a small engine: {found.error}"
        return Capability(name, False, why)
    if not machine.build.ok:
        return Capability(name, False, "it needs what building bundles needs", _build(machine).fix)
    sms = ", ".join(map(str, found.sms))
    return Capability(name, True, f"TensorRT-RTX {found.version}, for SM {sms}; needs no GPU")


def run_rtx(machine: Machine) -> Capability:
    """Whether an engine of TensorRT-RTX can be run."""
    name = "run TensorRT-RTX engines"
    refused = _rtx_reason(machine)
    if refused is not None:
        return Capability(name, False, *refused)
    gpu = _describe(machine.cuda.gpus[0])
    return Capability(name, True, f"TensorRT-RTX {machine.tensorrt_rtx.version} on {gpu}")


def _rtx_reason(machine: Machine) -> tuple[str, str | None] | None:
    """Why engines of TensorRT-RTX cannot run, and what to do; None where they can."""
    found = machine.tensorrt_rtx
    if (refused := _no_gpu_reason(machine)) is not None:
        return refused
    first, *others = machine.cuda.gpus  # the runtime takes the first
    if found.sms and first.sm not in found.sms:
        sms = ", ".join(map(str, found.sms))
        fitting = [_describe(gpu) for gpu in others if gpu.sm in found.sms]
        return (
            f"TensorRT-RTX {found.version} has engines for SM {sms}, not for {_describe(first)}",
            f"choose {fitting[0]} with CUDA_VISIBLE_DEVICES" if fitting else None,
        )
    if (refused := _unusable(machine, found, "TensorRT-RTX")) is not None:
        return refused
    if not machine.cuda.bindings:
        return "cuda-bindings cannot be imported", install_command(machine, "cuda-bindings")
    if not found.runs:
        return f"TensorRT-RTX {found.version} cannot load a small engine: {found.error}", None
    return None


def _no_gpu_reason(machine: Machine) -> tuple[str, str | None] | None:
    """Why a machine has no GPU that programs can use, and what to do; None where it has one."""
    cuda = machine.cuda
    if cuda.source is None:
        asked = "" if cuda.bindings else " by nvidia-smi, and cuda-bindings is not installed"
        return f"no NVIDIA driver was found{asked}", f"with an NVIDIA GPU: {_GET_DRIVER}"
    if (reason := _old_driver(machine)) is not None:
        return reason, _GET_DRIVER
    if cuda.error is not None and not cuda.gpus:
        return f"the NVIDIA driver fails: {cuda.error}", "see nvidia-smi; reboot or reinstall it"
    if not cuda.gpus and not cuda.bindings:
        why = "the NVIDIA driver cannot be asked for GPUs without cuda-bindings"
        return why, install_command(machine, "cuda-bindings")
    if not cuda.gpus:
        return "the NVIDIA driver sees no GPU", "see nvidia-smi and CUDA_VISIBLE_DEVICES"
    return None


def run_tensorrt(machine: Machine) -> Capability:
    """Whether enterprise TensorRT works; it builds on the GPU that the engine is for."""
    name, found = "build and run TensorRT engines (experimental)", machine.tensorrt
    if (refused := _no_gpu_reason(machine)) is not None:
        return Capability(name, False, *refused)
    if (refused := _unusable(machine, found, "TensorRT")) is not None:
        return Capability(name, False, *refused)
    if not (found.builds and found.runs):
        what = "load" if found.builds else "build"
        why = f"TensorRT {found.version} cannot {what} a small engine: {found.error}"
        return Capability(name, False, why)
    return Capability(name, True, f"TensorRT {found.version}; qwen-export was never run with it")


def _unusable(machine: Machine, found: TensorRT, label: str) -> tuple[str, str | None] | None:
    """Why a flavour of TensorRT cannot be imported, and what to do."""
    if found.version is not None:
        return None
    package = "tensorrt" if label == "TensorRT" else "tensorrt-rtx-cu13-bindings"
    if found.missing is not None:
        return f"{found.missing} is not installed", install_command(machine, package)
    return (
        f"{label} cannot be imported: {found.error}",
        install_command(machine, package, upgrade=True),
    )


def _old_driver(machine: Machine) -> str | None:
    """What is wrong with a driver that is too old for CUDA 13; None for one that is not."""
    cuda = machine.cuda
    release = cuda.driver and int(cuda.driver.split(".")[0])
    old = cuda.cuda_version < MIN_CUDA if cuda.cuda_version else release and release < MIN_DRIVER
    if cuda.source is None or not old:
        return None
    said = f"{cuda.driver}" if cuda.driver else ""
    if cuda.cuda_version:
        serves = f"for CUDA {cuda.cuda_version // 1000}.{cuda.cuda_version % 1000 // 10}"
        said = f"{said} {serves}".strip()
    return f"the NVIDIA driver must be release {MIN_DRIVER} or newer (CUDA 13), got {said}"


def _describe(gpu: Gpu) -> str:
    return f"{gpu.name} (SM {gpu.sm})"
