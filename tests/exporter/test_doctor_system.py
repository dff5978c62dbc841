"""What systems say, read by `qwen-export doctor`."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from qwen_export.doctor.examination import driver_release, parse_nvidia_smi
from qwen_export.doctor.machine import (
    Gpu,
)
from qwen_export.doctor.system import (
    available_memory,
    cpu_features,
    declared_packages,
    find_caches,
    read_cpu,
    read_memory,
)
from qwen_export.doctor.versions import is_wanted

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))


def test_requirements_are_read_with_extras_and_ranges() -> None:
    (package,) = declared_packages(
        [
            "click<9,>=8.1; extra == 'cuda'",
            'click[x] <9,>=8.1 ; python_version > "3" and extra == "cpu"',
            "pytest; extra == 'dev'",
        ]
    )
    assert package.wanted == "<9,>=8.1"
    assert package.extras == ("cuda", "cpu")
    assert package.installed == metadata.version("click")


def test_features_of_intel_and_arm_processors_have_their_names() -> None:
    intel = "model name\t: X\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n"
    assert cpu_features(intel) == ("AVX2", "AVX-512", "AVX-512 VNNI", "AMX INT8")
    assert cpu_features("Features\t: fp asimd asimddp i8mm\n") == ("NEON", "DOT", "I8MM")
    assert cpu_features("") == ()


def test_a_containers_limit_bounds_the_memory() -> None:
    assert available_memory(1000, "800\n", "500\n", "inactive_file 100\n") == 400
    assert available_memory(300, "800", "100", "") == 300
    assert available_memory(1000, "max", "500", "") == 1000
    assert available_memory(1000, "800", "900", "") == 0
    assert available_memory(None, "", "", "") is None


def test_nvidia_smi_is_understood() -> None:
    table = "NVIDIA L4, 8.9, 23034, 580.65.06\nNVIDIA GB10, 12.1, [N/A], 580.65.06\n"
    gpus, driver = parse_nvidia_smi(table)
    assert gpus == (Gpu("NVIDIA L4", 89, 23034 << 20),)
    assert driver == "580.65.06"
    assert parse_nvidia_smi("NVIDIA-SMI has failed because ...\n") == ((), None)


def test_the_drivers_release_is_read() -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 2024\n"
    assert driver_release(text) == "535.183.01"
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    assert driver_release(text) == "580.65.06"
    assert driver_release("") is None


def test_caches_are_measured_without_following_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_EXPORT_CACHE", str(tmp_path / "ours"))
    (tmp_path / "ours" / "packed" / "entry").mkdir(parents=True)
    (tmp_path / "ours" / "packed" / "entry" / "weights.bin").write_bytes(bytes(1000))
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "link").symlink_to(tmp_path / "ours" / "packed" / "entry" / "weights.bin")
    packed, checkpoints = find_caches({"HF_HUB_CACHE": str(hub)})
    assert (packed.path, packed.num_bytes) == (str(tmp_path / "ours" / "packed"), 1000)
    assert packed.writable
    assert checkpoints.num_bytes < 1000


def test_no_cache_is_listed_where_it_is_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_EXPORT_CACHE", "off")
    assert find_caches({"HF_HOME": str(tmp_path)}) == ()


def test_this_machines_cpu_and_memory_are_found() -> None:
    assert read_cpu().model
    assert read_cpu().cores >= 1
    memory = read_memory()
    assert memory.total_bytes is None or memory.total_bytes > 10**8
    if memory.total_bytes is not None and memory.available_bytes is not None:
        assert 0 < memory.available_bytes <= memory.total_bytes


def test_every_declared_package_is_understood() -> None:
    declared = PYPROJECT["project"]["optional-dependencies"]
    lines = [
        f'{requirement}; extra == "{extra}"'
        for extra, requirements in declared.items()
        for requirement in requirements
    ]
    found = {package.name: package for package in declared_packages(lines)}
    for extra in declared.keys() - {"dev"}:
        for requirement in declared[extra]:
            name = requirement.split(">=")[0].split("[")[0]
            assert extra in found[name].extras
            assert is_wanted("0.0.1", found[name].wanted) is False
    assert "pytest" not in found


def test_two_packages_of_one_module_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_export.doctor.system import module_distributions

    folder = tmp_path / "onnxruntime_gpu-1.31.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n"
    )
    (folder / "top_level.txt").write_text("onnxruntime\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert module_distributions("onnxruntime") == (
        f"onnxruntime {metadata.version('onnxruntime')}",
        "onnxruntime-gpu 1.31.1",
    )
