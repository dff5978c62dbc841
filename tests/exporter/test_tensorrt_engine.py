"""`qwen-export engine` and `build --target`, with TensorRT-RTX's own parser and builder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from engine_documents import description, write_engine
from safetensors.numpy import load_file, save_file
from small_checkpoints import small_checkpoint
from tensorrt_rtx import load_tensorrt

from qwen_export.bundle import BuildOptions, build
from qwen_export.cli import main
from qwen_export.errors import OutputError, TargetError
from qwen_export.targets import engine as engine_module
from qwen_export.targets.engine import build_engine
from qwen_export.targets.options import EngineOptions
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_file import EngineFolder
from qwen_runtime.errors import BundleError
from qwen_runtime.manifest import QuantizationEntry

TARGET = "tensorrt-rtx"
SMALL = EngineOptions(max_batch=2, max_sequence=8, capacity=32)

NewBundle = Callable[[], Bundle]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_tensorrt()
    monkeypatch.setenv("QWEN_EXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; not to be changed."""
    root = tmp_path_factory.mktemp("small")
    return build(
        small_checkpoint(root / "model"), root / "bundle", BuildOptions(verify=False)
    ).path


@pytest.fixture
def bundle(small_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy to build engines into."""
    return Bundle.open(shutil.copytree(small_bundle, tmp_path / "bundle"))


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the engine in the bundle -------------------------------------------------------------------


def test_an_engine_describes_itself_and_leaves_the_core_alone(bundle: Bundle):
    before = entries(bundle.path)
    made = build_engine(bundle, TARGET, SMALL)
    assert entries(bundle.path) == sorted([*before, "engines"])
    assert entries(bundle.path / "engines") == [TARGET]
    assert entries(made.path) == ["engine.json", "engine.plan"]
    bundle.check_hashes()
    made.check_hashes()
    found = EngineFolder.open(bundle, TARGET).description
    assert (found.flavour, found.compute_dtype, found.parity) == (TARGET, "bf16", "not_executed")
    assert found.version == load_tensorrt().__version__
    assert found.sms == (80, 86, 89, 120, 121)
    assert (found.max_batch, found.max_sequence, found.capacity) == (2, 8, 32)
    assert found.inputs == {
        name: bundle.manifest.files[name].sha256 for name in ("prefill.onnx", "weights.bin")
    }
    assert found.aliases == {
        f"present.{layer}.{part}": f"past_key_values.{layer}.{part}"
        for layer in range(2)
        for part in ("key", "value")
    }
    (plan,) = found.plans
    prefill, decode = plan.profiles
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.sizes["sequence"].max == 8
    assert prefill.activation_bytes is not None
    assert decode.activation_bytes is not None
    assert plan.weight_bytes is not None
    # Padding shows in a model as small as this; a second copy of its linear layers would more.
    assert 1 <= plan.weight_bytes / plan.graph_weight_bytes < 1.15
    assert any("mha" in kernel.name for kernel in plan.kernels)
    assert found.fp16_range is None


def test_separate_engines_are_built_from_both_graphs(bundle: Bundle):
    options = EngineOptions(max_batch=1, max_sequence=8, capacity=32, separate=True)
    made = build_engine(bundle, TARGET, options)
    assert entries(made.path) == ["decode.plan", "engine.json", "prefill.plan"]
    found = made.description
    assert set(found.inputs) == {"prefill.onnx", "decode.onnx", "weights.bin"}
    decode, index = found.profile("decode")
    assert (decode.graph, index, set(decode.profiles[0].sizes)) == ("decode", 0, {"batch"})
    assert found.profile("prefill")[0].graph == "prefill"
    assert "--separate-engines" in made.rebuild_command


def test_an_existing_engine_is_replaced_only_when_asked_for(bundle: Bundle):
    build_engine(bundle, TARGET, SMALL)
    with pytest.raises(OutputError, match="tensorrt-rtx exists; pass --overwrite"):
        build_engine(bundle, TARGET, SMALL)
    other = EngineOptions(max_batch=2, max_sequence=8, capacity=16)
    made = build_engine(bundle, TARGET, other, overwrite=True)
    assert made.description.capacity == 16
    assert entries(bundle.path / "engines") == [TARGET]


def test_what_is_no_engine_is_never_replaced(bundle: Bundle):
    precious = bundle.path / "engines" / TARGET
    precious.mkdir(parents=True)
    (precious / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not an engine \(it has no engine\.json\)"):
        build_engine(bundle, TARGET, SMALL, overwrite=True)
    assert (precious / "notes.txt").read_text() == "mine"


def test_a_build_that_fails_leaves_nothing_behind(bundle: Bundle):
    with pytest.raises(TargetError, match="bf16 needs SM 80 or newer, got 75"):
        build_engine(bundle, TARGET, EngineOptions(sms=(75, 80)))
    assert entries(bundle.path / "engines") == []


def test_a_damaged_bundle_gets_no_engine(bundle: Bundle):
    weights = bundle.path / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.bin: sha256 must be"):
        build_engine(bundle, TARGET, SMALL)
    assert not (bundle.path / "engines").exists()


def test_a_bundle_that_cannot_be_written_to_gets_no_engine(bundle: Bundle):
    (bundle.path / "engines").write_text("in the way")
    with pytest.raises(OutputError, match="must be writable"):
        build_engine(bundle, TARGET, SMALL)


def test_of_two_builds_at_the_same_time_one_wins_and_the_other_says_so(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    barrier = threading.Barrier(2)
    install = engine_module.install

    def together(*args: Any, **kwargs: Any) -> None:
        barrier.wait()
        install(*args, **kwargs)

    monkeypatch.setenv("QWEN_EXPORT_CACHE", "off")
    monkeypatch.setattr(engine_module, "install", together)
    failed: list[Exception] = []

    def work() -> None:
        try:
            build_engine(bundle, TARGET, SMALL)
        except OutputError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = failed
    assert "was built by another process meanwhile; that engine stays" in str(error)
    EngineFolder.open(bundle, TARGET).check_hashes()
    assert entries(bundle.path / "engines") == [TARGET]


def test_the_same_engine_is_built_once(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = build_engine(bundle, TARGET, SMALL)
    copy = Bundle.open(
        shutil.copytree(bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))
    )

    def not_again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(engine_module, "build_plan", not_again)
    second = build_engine(copy, TARGET, SMALL)
    assert second.description == first.description
    shutil.rmtree(copy.path / "engines")
    for other in (
        EngineOptions(max_batch=3, max_sequence=8, capacity=32),
        EngineOptions(max_batch=2, max_sequence=8, capacity=32, sms=(89,)),
    ):
        with pytest.raises(AssertionError, match="built again"):
            build_engine(copy, TARGET, other)
    monkeypatch.setenv("QWEN_EXPORT_CACHE", "off")
    with pytest.raises(AssertionError, match="built again"):
        build_engine(copy, TARGET, SMALL)


@pytest.mark.parametrize(("scratch_mb", "warned"), [(1000, True), (100, False), (None, False)])
def test_weights_that_decode_unpacks_are_warned_of(
    bundle: Bundle, scratch_mb: int | None, warned: bool
):
    (plan,) = description().plans
    prefill, decode = plan.profiles
    scratch = None if scratch_mb is None else scratch_mb * 1_000_000
    profiles = (
        replace(prefill, activation_bytes=2_000_000_000),
        replace(decode, activation_bytes=scratch),
    )
    plan = replace(plan, weight_bytes=500_000_000, profiles=profiles)
    groups = QuantizationEntry(8, 32, "search", None, ())
    quantised = replace(bundle, manifest=replace(bundle.manifest, quantization=groups))
    found = engine_module._scratch_warnings(quantised, plan)
    assert len(found) == warned
    if warned:
        assert found[0].startswith("decode needs 1,000 MB of scratch memory beside 500 MB")
    assert engine_module._scratch_warnings(bundle, plan) == []


# --- float16 ------------------------------------------------------------------------------------


def test_fp16_records_how_near_to_its_end_the_model_came(bundle: Bundle):
    options = EngineOptions("fp16", max_batch=2, max_sequence=8, capacity=32, sms=(75, 86))
    found = build_engine(bundle, TARGET, options).description
    assert found.compute_dtype == "fp16"
    assert found.sms == (75, 86)
    assert found.fp16_range is not None
    assert 0 < found.fp16_range.largest < 32752
    assert found.fp16_range.node.startswith("/")


def test_fp16_is_refused_where_a_layer_would_overflow(tmp_path: Path):
    folder = small_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 60_000
    save_file(weights, folder / "model.safetensors")
    loud = build(folder, tmp_path / "loud", BuildOptions(verify=False))
    result = run("engine", loud.path, "--target", TARGET, "--compute-dtype", "fp16")
    assert result.exit_code == 1
    assert "/model/layers.1/mlp/down_proj/MatMul reaches" in result.stderr
    assert "build with --compute-dtype bf16" in result.stderr
    assert entries(loud.path / "engines") == []


# --- command line -------------------------------------------------------------------------------


def test_the_command_builds_an_engine_that_inspect_shows(bundle: Bundle):
    command = ("engine", bundle.path, "--target", TARGET, "--max-batch", "2", "--capacity", "32")
    result = run(*command, "--sms", "86,89", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)["engines"][TARGET]
    assert document["sms"] == [86, 89]
    assert document["path"] == str(bundle.path / "engines" / TARGET)
    result = run("inspect", bundle.path)
    assert result.exit_code == 0, result.output
    assert "engine: engines/tensorrt-rtx" in result.stdout
    assert "bf16, 2 rows of 32 tokens, SM 86, 89; not executed" in result.stdout
    assert "prefill     batch 1-2, sequence 1-32, num_logits 1-32; scratch" in result.stdout
    assert f"build again   qwen-export engine {bundle.path} --target {TARGET}" in result.stdout
    shown = json.loads(run("inspect", bundle.path, "--json").stdout)["engines"][TARGET]
    assert shown == {key: value for key, value in document.items() if key != "path"}
    (bundle.path / "engines" / TARGET / "engine.plan").write_bytes(b"")
    result = run("inspect", bundle.path)
    assert result.exit_code == 0, result.output
    assert "unusable" in result.stdout
    assert "size must be" in json.loads(run("inspect", bundle.path, "--json").stdout)["engines"][
        TARGET
    ]["unusable"]  # fmt: skip


def test_the_command_builds_again_what_the_engine_says(bundle: Bundle):
    made = build_engine(bundle, TARGET, SMALL)
    program, *arguments = made.rebuild_command.split()
    assert program == "qwen-export"
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert EngineFolder.open(bundle, TARGET).description.options == made.description.options


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "Missing option '--target'"),
        (("--target", "openvino"), 2, "'openvino' is not one of"),
        (("--target", TARGET, "--sms", "86;89"), 2, "must be whole numbers with commas"),
        (
            ("--target", TARGET, "--compute-dtype", "fp32"),
            2,
            "must be bf16 or fp16 for tensorrt-rtx",
        ),
        (("--target", TARGET, "--max-batch", "0"), 2, "0 is not in the range x>=1"),
        (("--target", TARGET, "--sms", "90"), 1, "SM must be one of"),
        (("--target", TARGET, "--capacity", "65"), 1, "the bundle's context of 64 tokens"),
        (("--target", TARGET, "--max-batch", "1"), 1, "--max-batch must be at least 2"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_built(
    bundle: Bundle, arguments: tuple[str, ...], status: int, message: str
):
    result = run("engine", bundle.path, *arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert not (bundle.path / "engines").exists()


def test_a_target_that_is_not_installed_is_refused_before_anything_is_built(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    # With another one that is: nothing is built for that either.
    result = run("engine", bundle.path, "--target", TARGET, "--target", "tensorrt")
    assert result.exit_code == 1
    assert "pip install 'qwen-export[tensorrt]'" in result.stderr
    assert not (bundle.path / "engines").exists()
    result = run("build", "--output", tmp_path / "out", "--target", "tensorrt")
    assert result.exit_code == 1
    assert "pip install 'qwen-export[tensorrt]'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_says_that_the_enterprise_target_was_never_executed():
    for command in ("build", "engine"):
        text = " ".join(run(command, "--help").output.split())
        assert "is experimental and was never executed" in text


def test_build_adds_the_engines_it_is_asked_for(tmp_path: Path):
    folder = small_checkpoint(tmp_path / "model")
    result = run("build", folder, "--output", tmp_path / "out", "--no-verify", "--target", TARGET)
    assert result.exit_code == 0, result.output
    assert "engines/tensorrt-rtx: 3." in result.stdout
    assert "8 rows of 64 tokens, SM 80, 86, 89, 120, 121; not executed" in result.stdout
    found = EngineFolder.open(Bundle.open(tmp_path / "out"), TARGET).description
    assert (found.max_batch, found.max_sequence, found.capacity) == (8, 64, 64)


def test_a_bundle_stays_when_its_engine_cannot_be_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise TargetError("TensorRT cannot build the engine: no", names=["x"])

    monkeypatch.setattr(engine_module, "build_plan", fail)
    options = BuildOptions(verify=False, targets=(TARGET,))
    with pytest.raises(
        TargetError, match="out is complete, but it has no engine for tensorrt-rtx"
    ):
        build(small_checkpoint(tmp_path / "model"), tmp_path / "out", options)
    Bundle.open(tmp_path / "out").check_hashes()
    assert entries(tmp_path / "out" / "engines") == []


def test_ctrl_c_stops_a_build_and_leaves_nothing_behind(embedded_bundle: Path, tmp_path: Path):
    folder = shutil.copytree(embedded_bundle, tmp_path / "bundle")
    command = [sys.executable, "-m", "qwen_export", "engine", str(folder), "--target", TARGET]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "Building the engine" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 1
    assert "Aborted!" in rest
    assert entries(folder / "engines") == []


def test_leftovers_of_a_build_that_died_are_removed_by_the_next(bundle: Bundle):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = bundle.path / "engines" / f".{TARGET}.building-{dead.pid}-0a0b0c0d-1"
    write_engine(left)
    build_engine(bundle, TARGET, SMALL)
    assert entries(bundle.path / "engines") == [TARGET]
