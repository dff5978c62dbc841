"""Machines described as data, for the tests of `qwen-export doctor`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwen_export.doctor import capabilities
from qwen_export.doctor.machine import (
    Cpu,
    Cuda,
    Gpu,
    Machine,
    Memory,
    OnnxRuntime,
    Package,
    TensorRT,
    Trial,
)
from qwen_export.doctor.verdict import Capability

ADA = Gpu("NVIDIA L4", 89, 24 << 30)
HOPPER = Gpu("NVIDIA H100 80GB HBM3", 90, 80 << 30)
RTX = TensorRT("1.7.1.116", (75, 80, 86, 89, 120, 121), builds=True, runs=True)
PACKAGES = (
    Package("click", "8.5.1", "<9,>=8.1"),
    Package("onnxruntime", "1.31.1", "<1.32,>=1.31", ("cpu", "export")),
    Package("torch", "2.13.0+cpu", "<2.14,>=2.13", ("export",)),
    Package("transformers", "5.23.0", "<5.24,>=5.23", ("export",)),
    Package("tensorrt-rtx-cu13-bindings", "1.7.1.116", "<1.8,>=1.7", ("tensorrt-rtx",)),
    Package("tensorrt-rtx-cu13-libs", "1.7.1.116", "<1.8,>=1.7", ("tensorrt-rtx",)),
    Package("llguidance", "1.9.1", "<2,>=1.9", ("grammar",)),
)
WORKSTATION = Machine(
    version="0.1.0",
    os="Linux 6.1 x86_64",
    python="3.11.7",
    cpu=Cpu("Some CPU", 16, ("AVX2", "AVX-512")),
    memory=Memory(64 * 10**9, 60 * 10**9),
    packages=PACKAGES,
    onnxruntime=OnnxRuntime(
        ("onnxruntime 1.31.1",), "1.31.1", ("CPUExecutionProvider",), runs_cpu=True
    ),
    tensorrt_rtx=RTX,
    tensorrt=TensorRT(missing="tensorrt", error="No module named 'tensorrt'"),
    cuda=Cuda("cuda-bindings", "580.65.06", 13000, (ADA,), bindings=True),
    build=Trial(True, 8.0),
    grammar=Trial(True, 0.1),
)
RUN_RTX, RUN_CPU, BUILD = "run TensorRT-RTX engines", "run bundles on the CPU", "build bundles"
BUILD_RTX, ENTERPRISE = "build TensorRT-RTX engines", "build and run TensorRT engines"
RUN_CUDA = "run bundles on a GPU with ONNX Runtime"
GRAMMAR = "hold answers to a grammar"


def verdict(machine: Machine, name: str) -> Capability:
    (found,) = [each for each in capabilities(machine) if each.name.startswith(name)]
    return found


def with_cuda(**changes: Any) -> Machine:
    return replace(WORKSTATION, cuda=replace(WORKSTATION.cuda, **changes))


def without(package: str, machine: Machine = WORKSTATION) -> Machine:
    packages = tuple(
        replace(each, installed=None) if each.name == package else each
        for each in machine.packages
    )
    return replace(machine, packages=packages)
