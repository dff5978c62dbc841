"""Bundles and engines on machines, and the page, of `qwen-export doctor`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import click
from exporter.doctor_machines import HOPPER, RTX, WORKSTATION, with_cuda
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.doctor import bundle_capabilities, capabilities, faults, read_bundle, report_text
from qwen_export.doctor.bundle_fit import (
    BundleFacts,
    EngineFacts,
    LoweredFacts,
    needed_bytes,
)
from qwen_export.doctor.machine import (
    Cpu,
    Cuda,
    Gpu,
    Machine,
    Memory,
    OnnxRuntime,
    TensorRT,
    Trial,
)
from qwen_export.doctor.verdict import Capability
from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_description import EngineDescription, EngineProfile, PlanEntry, SizeEntry
from qwen_runtime.engine_file import EngineFolder


def small_bundle(golden_bundle: Callable[[str], Path], folder: Path) -> Bundle:
    shutil.copytree(golden_bundle("qwen2_untied"), folder)
    return Bundle.open(folder)


def add_engine(bundle: Bundle, *, version: str, sms: tuple[int, ...]) -> None:
    """An engine whose plan is no plan, but which says what it was built for."""
    sizes = {"batch": SizeEntry(1, 1, 2)}
    profiles = (EngineProfile("prefill", sizes, None), EngineProfile("decode", sizes, None))
    plan = PlanEntry("engine.plan", "prefill", "0" * 64, 4, None, 4, profiles, ())
    graph_and_weights = ("prefill.onnx", bundle.manifest.weights.file)
    description = EngineDescription(
        producer="qwen-export 0.1.0",
        created=datetime(2026, 1, 1, tzinfo=UTC).isoformat(),
        flavour="tensorrt-rtx",
        version=version,
        sms=sms,
        compute_dtype="bf16",
        capacity=64,
        max_batch=1,
        max_sequence=16,
        max_num_logits=1,
        inputs={name: bundle.manifest.files[name].sha256 for name in graph_and_weights},
        options=("--target", "tensorrt-rtx"),
        aliases={f"present.0.{it}": f"past_key_values.0.{it}" for it in ("key", "value")},
        plans=(plan,),
        warnings=(),
    )
    folder = bundle.path / "engines" / "tensorrt-rtx"
    folder.mkdir(parents=True)
    (folder / "engine.plan").write_bytes(b"plan")
    (folder / "engine.json").write_text(description.to_json(), "utf-8")


def test_engines_are_judged_by_release_and_gpu(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = small_bundle(golden_bundle, tmp_path / "bundle")
    add_engine(bundle, version="1.7.1.116", sms=(80, 89))
    facts = read_bundle(bundle, replace(with_cuda(gpus=()), onnxruntime=OnnxRuntime(())))

    def engine_on(machine: Machine) -> Capability:
        (_, found) = bundle_capabilities(machine, facts)
        return found

    assert engine_on(WORKSTATION).can
    assert engine_on(WORKSTATION).why.endswith("SM 89, as NVIDIA L4 has; not tried")
    blackwell = engine_on(with_cuda(gpus=(Gpu("NVIDIA RTX PRO 6000", 120, 96 << 30),)))
    assert not blackwell.can
    assert "built for SM 80, 89, but this GPU has SM 120" in blackwell.why
    newer = engine_on(replace(WORKSTATION, tensorrt_rtx=replace(RTX, version="1.8.0.1")))
    assert not newer.can
    assert "build it again: qwen-export engine" in newer.why
    none = engine_on(with_cuda(source=None, gpus=()))
    assert none.why == "no NVIDIA driver was found"


def test_an_engine_can_run_only_if_it_did_when_it_was_tried(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = small_bundle(golden_bundle, tmp_path / "bundle")
    add_engine(bundle, version="1.7.1.116", sms=(89,))
    folder = EngineFolder.open(bundle, "tensorrt-rtx")

    def verdict_on(trial: Trial) -> Capability:
        engine = EngineFacts("tensorrt-rtx", folder, trial=trial)
        (_, found) = bundle_capabilities(WORKSTATION, BundleFacts("b", "fp32", 10, (engine,)))
        return found

    assert verdict_on(Trial(True, 2.0)).why == "on NVIDIA L4 it answered with a token after 2.0 s"
    failed = verdict_on(Trial(False, 2.0, "out of device memory"))
    assert not failed.can
    assert failed.why == "it fails: out of device memory"


def test_an_engine_is_tried_where_nothing_speaks_against_it(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = small_bundle(golden_bundle, tmp_path / "bundle")
    add_engine(bundle, version="1.7.1.116", sms=(89,))
    facts = read_bundle(bundle, replace(WORKSTATION, onnxruntime=OnnxRuntime(())))
    (_, engine) = bundle_capabilities(WORKSTATION, facts)
    # Whatever this machine is: what lies there is no plan.
    assert not engine.can
    assert engine.why.startswith("it fails: ")


def test_a_damaged_engine_is_refused_with_the_reason(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = small_bundle(golden_bundle, tmp_path / "bundle")
    add_engine(bundle, version="1.7.1.116", sms=(89,))
    (bundle.path / "engines" / "tensorrt-rtx" / "engine.plan").write_bytes(b"longer plan")
    facts = read_bundle(bundle, replace(WORKSTATION, onnxruntime=OnnxRuntime(())))
    (_, engine) = bundle_capabilities(WORKSTATION, facts)
    assert not engine.can
    assert "size must be 4 bytes, got 11" in engine.why


def test_graphs_for_cuda_are_judged_by_the_machine_and_by_trying(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    cuda = replace(WORKSTATION.onnxruntime, providers=("CUDAExecutionProvider",), runs_cuda=True)
    with_provider = replace(WORKSTATION, onnxruntime=cuda)

    def verdict_on(machine: Machine, facts: BundleFacts) -> Capability:
        (_, found) = bundle_capabilities(machine, facts)
        return found

    facts = BundleFacts("b", "fp32", 10)
    assert len(bundle_capabilities(WORKSTATION, facts)) == 1
    missing = verdict_on(with_provider, facts)
    assert (missing.can, missing.why) == (False, "it has none")
    assert missing.fix == "qwen-export engine b --target cuda"

    bundle = small_bundle(golden_bundle, tmp_path / "bundle")
    lower_bundle(bundle, "cuda", LoweringOptions("fp16"))
    facts = read_bundle(bundle, replace(WORKSTATION, memory=Memory(1, 1)))
    assert facts.lowered == LoweredFacts("fp16")
    refused = verdict_on(WORKSTATION, facts)
    assert refused.fix == "pip uninstall -y onnxruntime && pip install 'qwen-export[cuda]'"

    tried = replace(facts, lowered=LoweredFacts("fp16", trial=Trial(True, 2.0)))
    assert verdict_on(with_provider, tried).why == (
        "in fp16 on NVIDIA L4 they answered with a token after 2.0 s"
    )
    failed = replace(facts, lowered=LoweredFacts("fp16", trial=Trial(False, 2.0, "no memory")))
    assert verdict_on(with_provider, failed).why == "they fail: no memory"

    (bundle.path / "lowered" / "cuda" / "decode.onnx").write_bytes(b"short")
    damaged = verdict_on(WORKSTATION, read_bundle(bundle, WORKSTATION))
    assert (damaged.can, "decode.onnx: size must be" in damaged.why) == (False, True)


def test_the_graph_that_answered_on_the_cpu_is_named(tmp_path: Path) -> None:
    made = build(
        small_checkpoint(tmp_path / "model"), tmp_path / "out", BuildOptions("int8", verify=False)
    )
    facts = read_bundle(made, WORKSTATION)
    assert (facts.has_cpu_graph, facts.graph) == (True, "lowered/cpu/prefill.onnx")
    (runs,) = bundle_capabilities(WORKSTATION, facts)
    assert (runs.can, runs.fix) == (True, None)
    assert runs.why.startswith("lowered/cpu/prefill.onnx answered with a token after ")

    damaged = made.path / "lowered" / "cpu" / "prefill.onnx"
    damaged.write_bytes(b"short")
    (refused,) = bundle_capabilities(WORKSTATION, read_bundle(made, WORKSTATION))
    assert not refused.can
    assert "--target cpu --overwrite" in refused.why

    shutil.rmtree(made.path / "lowered")
    portable = read_bundle(made, WORKSTATION)
    assert (portable.has_cpu_graph, portable.graph) == (False, "prefill.onnx")
    (runs,) = bundle_capabilities(WORKSTATION, portable)
    assert runs.can
    assert runs.fix == f"qwen-export engine {made.path} --target cpu"


def test_a_graph_for_the_cpu_that_found_no_room_is_told_from_one_that_is_not_there() -> None:
    facts = BundleFacts(
        "b", "int4", 10**9, trial=Trial(True, 1.0), graph="prefill.onnx", has_cpu_graph=True
    )
    (runs,) = bundle_capabilities(WORKSTATION, facts)
    assert runs.can
    assert "has no room for what lowered/cpu loads" in runs.why
    assert runs.fix == "set TMPDIR to a folder with 1,000 MB"
    plain = BundleFacts("b", "fp32", 10, trial=Trial(True, 1.0), graph="prefill.onnx")
    (runs,) = bundle_capabilities(WORKSTATION, plain)
    assert (runs.why, runs.fix) == ("prefill.onnx answered with a token after 1.0 s", None)


def test_a_bundle_larger_than_memory_is_not_even_tried(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = small_bundle(golden_bundle, tmp_path / "bundle")
    small = replace(WORKSTATION, memory=Memory(10**9, 10**8))
    facts = read_bundle(bundle, small)
    assert facts.trial is None
    (runs,) = bundle_capabilities(small, facts)
    assert not runs.can
    assert "it needs 0.3 GB of memory and the caches, 0.1 GB are available" in runs.why
    assert runs.fix is not None
    assert "--precision int4" in runs.fix


def test_quantised_weights_are_twice_in_memory_while_they_load() -> None:
    plain, packed = (needed_bytes(BundleFacts("b", p, 10**9)) for p in ("fp32", "int4"))
    assert packed - plain == 10**9


def test_a_bundle_that_fails_when_tried_is_quoted() -> None:
    facts = BundleFacts("b", "fp32", 10, trial=Trial(False, 1.0, "weights.bin: damaged"))
    (runs,) = bundle_capabilities(WORKSTATION, facts)
    assert not runs.can
    assert runs.why == "it fails: weights.bin: damaged"


def test_the_page_fits_80_columns_and_shows_every_fix() -> None:
    both = replace(
        WORKSTATION.onnxruntime, distributions=("onnxruntime 1.31.1", "onnxruntime-gpu 1.31.1")
    )
    libraries = {"cudart": "/usr/local/cuda-13.0/lib64/libcudart.so.13", "cudnn": None}
    machine = with_cuda(gpus=(HOPPER,), driver="535.183.01", cuda_version=12020)
    machine = replace(machine, onnxruntime=both, cuda=replace(machine.cuda, libraries=libraries))
    wrong, can = faults(machine), capabilities(machine)
    text = report_text(machine, can, wrong, bundle=("artifacts/x", can[:1]), width=80)
    plain = click.unstyle(text)
    assert max(map(len, plain.splitlines())) <= 80
    unwrapped = " ".join(plain.split())
    for each in (*can, *wrong):
        assert each.fix is None or each.fix in unwrapped
    assert "not found: cudnn" in unwrapped
    assert "With artifacts/x" in unwrapped


def test_a_machine_with_nothing_still_gets_a_page() -> None:
    machine = Machine(
        version="0.1.0",
        os="Darwin 24 arm64",
        python="3.11.7",
        cpu=Cpu("arm", 8, ()),
        memory=Memory(None, None),
        packages=(),
        onnxruntime=OnnxRuntime(()),
        tensorrt_rtx=TensorRT(missing="tensorrt_rtx_bindings"),
        tensorrt=TensorRT(missing="tensorrt"),
        cuda=Cuda(),
        build=Trial(False, 0.1, "No module named 'torch'"),
        grammar=Trial(False, 0.1, "No module named 'llguidance'"),
    )
    found = capabilities(machine)
    assert not any(each.can for each in found)
    text = click.unstyle(report_text(machine, found, faults(machine)))
    assert "unknown, unknown available" in text
    assert "no   run bundles on the CPU" in text
