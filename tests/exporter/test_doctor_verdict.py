"""What `qwen-export doctor` concludes for machines that are described as data."""

from __future__ import annotations

from dataclasses import replace

import pytest
from exporter.doctor_machines import (
    ADA,
    BUILD,
    BUILD_RTX,
    ENTERPRISE,
    GRAMMAR,
    HOPPER,
    PACKAGES,
    RTX,
    RUN_CPU,
    RUN_CUDA,
    RUN_RTX,
    WORKSTATION,
    verdict,
    with_cuda,
    without,
)

from qwen_export.doctor import capabilities, faults
from qwen_export.doctor.machine import (
    CacheFolder,
    OnnxRuntime,
    Package,
    TensorRT,
    Trial,
)
from qwen_export.doctor.versions import is_wanted


def test_a_complete_workstation_can_do_everything_but_what_takes_another_package() -> None:
    refused = [each.name for each in capabilities(WORKSTATION) if not each.can]
    assert refused == [
        f"{RUN_CUDA} (experimental)",
        "build and run TensorRT engines (experimental)",
    ]
    assert faults(WORKSTATION) == ()
    assert verdict(WORKSTATION, RUN_RTX).why == "TensorRT-RTX 1.7.1.116 on NVIDIA L4 (SM 89)"


def test_a_machine_without_a_driver_builds_engines_and_runs_none() -> None:
    machine = with_cuda(source=None, driver=None, cuda_version=None, gpus=())
    machine = replace(machine, tensorrt_rtx=replace(RTX, runs=False, error="cudaError 35"))
    assert verdict(machine, BUILD_RTX).can
    runs = verdict(machine, RUN_RTX)
    assert not runs.can
    assert runs.why == "no NVIDIA driver was found"
    assert runs.fix is not None
    assert "release 580 or newer" in runs.fix
    assert faults(machine) == ()


def test_without_cuda_bindings_nobody_claims_that_there_is_no_driver() -> None:
    machine = with_cuda(source=None, driver=None, cuda_version=None, gpus=(), bindings=False)
    assert "cuda-bindings is not installed" in verdict(machine, RUN_RTX).why
    machine = with_cuda(source="/proc", cuda_version=None, gpus=(), bindings=False)
    runs = verdict(machine, RUN_RTX)
    assert "cannot be asked for GPUs" in runs.why
    assert runs.fix == "pip install cuda-bindings"


@pytest.mark.parametrize(
    ("driver", "cuda_version", "said"),
    [
        ("535.183.01", 12020, "got 535.183.01 for CUDA 12.2"),
        (None, 12090, "got for CUDA 12.9"),
        ("575.57.08", None, "got 575.57.08"),
    ],
)
def test_a_driver_that_is_too_old_is_a_fault(
    driver: str | None, cuda_version: int | None, said: str
) -> None:
    machine = with_cuda(driver=driver, cuda_version=cuda_version)
    (fault,) = faults(machine)
    assert fault.what == f"the NVIDIA driver must be release 580 or newer (CUDA 13), {said}"
    runs = verdict(machine, RUN_RTX)
    assert not runs.can
    assert runs.why == fault.what
    assert not verdict(machine, ENTERPRISE).can


def test_a_driver_that_fails_is_quoted() -> None:
    machine = with_cuda(gpus=(), error="cuInit answered CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")
    assert "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" in verdict(machine, RUN_RTX).why


def test_a_driver_that_hides_every_gpu_points_at_the_variable() -> None:
    runs = verdict(with_cuda(gpus=()), RUN_RTX)
    assert runs.why == "the NVIDIA driver sees no GPU"
    assert runs.fix is not None
    assert "CUDA_VISIBLE_DEVICES" in runs.fix


def test_sm_90_is_refused_by_name_and_a_second_gpu_can_be_chosen() -> None:
    runs = verdict(with_cuda(gpus=(HOPPER,)), RUN_RTX)
    assert not runs.can
    assert runs.why == (
        "TensorRT-RTX 1.7.1.116 has engines for SM 75, 80, 86, 89, 120, 121, not for NVIDIA H100 "
        "80GB HBM3 (SM 90)"
    )
    assert runs.fix is None
    runs = verdict(with_cuda(gpus=(HOPPER, ADA)), RUN_RTX)
    assert not runs.can
    assert runs.fix == "choose NVIDIA L4 (SM 89) with CUDA_VISIBLE_DEVICES"
    assert verdict(with_cuda(gpus=(ADA, HOPPER)), RUN_RTX).can


def test_engines_need_cuda_bindings_to_run() -> None:
    machine = with_cuda(source="nvidia-smi", cuda_version=None, bindings=False)
    runs = verdict(machine, RUN_RTX)
    assert runs.fix == "pip install cuda-bindings"
    bindings = Package("cuda-bindings", None, ">=13", ("tensorrt-rtx",))
    machine = replace(machine, packages=(*PACKAGES, bindings))
    assert verdict(machine, RUN_RTX).fix == "pip install 'qwen-export[tensorrt-rtx]'"


def test_an_engine_that_does_not_load_is_no_yes() -> None:
    machine = replace(WORKSTATION, tensorrt_rtx=replace(RTX, runs=False, error="out of memory"))
    runs = verdict(machine, RUN_RTX)
    assert not runs.can
    assert runs.why.endswith("cannot load a small engine: out of memory")


GPU_PACKAGE = OnnxRuntime(
    ("onnxruntime-gpu 1.31.1",),
    "1.31.1",
    ("CUDAExecutionProvider", "CPUExecutionProvider"),
    runs_cpu=True,
    runs_cuda=True,
)


def test_onnxruntime_runs_on_a_gpu_only_if_it_did_when_it_was_tried() -> None:
    machine = replace(WORKSTATION, onnxruntime=GPU_PACKAGE)
    runs = verdict(machine, RUN_CUDA)
    assert runs.can
    assert runs.why == (
        "onnxruntime 1.31.1 computed an attention on NVIDIA L4 (SM 89); qwen-export was never run so"
    )
    failing = replace(GPU_PACKAGE, runs_cuda=False, error="libcudnn.so.9 is missing")
    runs = verdict(replace(machine, onnxruntime=failing), RUN_CUDA)
    assert (runs.can, runs.fix) == (False, "pip install -U 'qwen-export[cuda]'")
    assert runs.why.endswith("fails on NVIDIA L4 (SM 89): libcudnn.so.9 is missing")


def test_what_onnxruntime_lacks_to_run_on_a_gpu_is_named_with_the_command() -> None:
    runs = verdict(WORKSTATION, RUN_CUDA)
    assert runs.why == "onnxruntime 1.31.1 is the package without CUDAExecutionProvider"
    assert runs.fix == "pip uninstall -y onnxruntime && pip install 'qwen-export[cuda]'"
    runs = verdict(replace(WORKSTATION, onnxruntime=OnnxRuntime(())), RUN_CUDA)
    assert (runs.why, runs.fix) == (
        "onnxruntime is not installed",
        "pip install 'qwen-export[cuda]'",
    )
    runs = verdict(replace(with_cuda(bindings=False), onnxruntime=GPU_PACKAGE), RUN_CUDA)
    assert (runs.why, runs.fix) == (
        "cuda-bindings cannot be imported",
        "pip install 'qwen-export[cuda]'",
    )
    runs = verdict(with_cuda(source=None, gpus=()), RUN_CUDA)
    assert runs.why == "no NVIDIA driver was found"


def test_missing_tensorrt_rtx_comes_with_its_extra() -> None:
    missing = TensorRT(missing="tensorrt_rtx_bindings", error="No module named ...")
    machine = replace(WORKSTATION, tensorrt_rtx=missing)
    for name in (BUILD_RTX, RUN_RTX):
        assert not verdict(machine, name).can
        assert verdict(machine, name).fix == "pip install 'qwen-export[tensorrt-rtx]'"


def test_a_broken_tensorrt_rtx_is_quoted() -> None:
    broken = TensorRT(error="ImportError: libtensorrt_rtx.so.1: cannot open shared object file")
    machine = replace(WORKSTATION, tensorrt_rtx=broken)
    builds = verdict(machine, BUILD_RTX)
    assert "libtensorrt_rtx.so.1" in builds.why
    assert builds.fix == "pip install -U 'qwen-export[tensorrt-rtx]'"


def test_enterprise_tensorrt_must_build_and_load() -> None:
    works = TensorRT("11.4.0", builds=True, runs=True)
    machine = replace(WORKSTATION, tensorrt=works)
    assert verdict(machine, ENTERPRISE).can
    assert "never run" in verdict(machine, ENTERPRISE).why
    machine = replace(WORKSTATION, tensorrt=replace(works, runs=False, error="no memory"))
    assert "cannot load a small engine: no memory" in verdict(machine, ENTERPRISE).why


def test_two_packages_of_onnxruntime_are_a_fault() -> None:
    both = ("onnxruntime 1.31.1", "onnxruntime-gpu 1.31.1")
    machine = replace(
        WORKSTATION, onnxruntime=replace(WORKSTATION.onnxruntime, distributions=both)
    )
    (fault,) = faults(machine)
    assert fault.what.startswith("onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both")
    assert fault.fix == (
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'qwen-export[cpu]'"
    )
    cuda = Package("onnxruntime-gpu", "1.31.1", ">=1.31", ("cuda",))
    (fault,) = faults(replace(machine, packages=(*PACKAGES, cuda)))
    assert fault.fix.endswith("pip install 'qwen-export[cuda]'")


def test_a_missing_build_package_is_named_with_the_extra() -> None:
    machine = replace(without("torch"), build=Trial(False, 0.2, "No module named 'torch'"))
    builds = verdict(machine, BUILD)
    assert not builds.can
    assert builds.required
    assert builds.why == "not installed: torch"
    assert builds.fix == "pip install 'qwen-export[export]'"
    assert not verdict(machine, BUILD_RTX).can


def test_a_build_that_fails_is_quoted() -> None:
    machine = replace(WORKSTATION, build=Trial(False, 3.0, "cannot import name 'x' from 'torch'"))
    assert "cannot import name 'x'" in verdict(machine, BUILD).why
    assert verdict(machine, BUILD).fix == "pip install -U 'qwen-export[export]'"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (OnnxRuntime((), error="No module named 'onnxruntime'"), "onnxruntime is not installed"),
        (
            OnnxRuntime(("onnxruntime 1.31.1",), error="ImportError: GLIBC_2.38 not found"),
            "onnxruntime cannot be imported: ImportError: GLIBC_2.38 not found",
        ),
        (
            OnnxRuntime(("onnxruntime 1.18.0",), "1.18.0", error="Fail: opset 24"),
            "onnxruntime 1.18.0 fails: Fail: opset 24",
        ),
    ],
)
def test_an_onnxruntime_that_does_not_run_makes_the_machine_unfit(
    found: OnnxRuntime, why: str
) -> None:
    runs = verdict(replace(WORKSTATION, onnxruntime=found), RUN_CPU)
    assert not runs.can
    assert runs.required
    assert runs.why == why
    assert runs.fix is not None
    assert "'qwen-export[cpu]'" in runs.fix


def test_a_grammar_that_cannot_be_compiled_is_no_yes() -> None:
    failed = Trial(False, 0.1, "boom")
    assert verdict(replace(WORKSTATION, grammar=failed), GRAMMAR).why == (
        "llguidance 1.9.1 fails: boom"
    )
    machine = replace(without("llguidance"), grammar=failed)
    assert verdict(machine, GRAMMAR).fix == "pip install 'qwen-export[grammar]'"


def test_a_version_out_of_range_is_a_fault() -> None:
    packages = (replace(PACKAGES[2], installed="2.6.0+cu124"),)
    (fault,) = faults(replace(WORKSTATION, packages=packages))
    assert fault.what == "torch must be <2.14,>=2.13, got 2.6.0+cu124"
    assert fault.fix == "pip install -U 'qwen-export[export]'"


def test_tensorrt_rtx_of_two_releases_is_a_fault() -> None:
    packages = (PACKAGES[4], replace(PACKAGES[5], installed="1.7.0.99"))
    (fault,) = faults(replace(WORKSTATION, packages=packages))
    assert "of one release, got 1.7.0.99 and 1.7.1.116" in fault.what


def test_a_cache_that_cannot_be_written_is_a_fault() -> None:
    cache = CacheFolder("/mnt/cache", "packed weights", 10, False, "QWEN_EXPORT_CACHE")
    (fault,) = faults(replace(WORKSTATION, caches=(cache,)))
    assert fault.what == "/mnt/cache (packed weights) cannot be written to"
    assert "QWEN_EXPORT_CACHE" in fault.fix


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("1.31.1", "<1.32,>=1.31", True),
        ("1.32.0", "<1.32,>=1.31", False),
        ("1.9", ">=1.31", False),
        ("2", ">=2.0", True),
        ("2.13.0+cpu", "<2.14,>=2.13", True),
        ("5", "", True),
    ],
)
def test_versions_compare_by_number(version: str, wanted: str, fits: bool) -> None:
    assert is_wanted(version, wanted) is fits


def test_an_unknown_version_condition_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be made of"):
        is_wanted("1.0", "~=1.0")
