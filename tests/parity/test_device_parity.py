"""`verify` on a device: the CUDA runner over the host's memory, the TensorRT runner over a double."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from cuda_double import HostSeam
from tensorrt_double import TensorRtDouble
from tensorrt_engines import add_engine, linked_bundle

from qwen_export.checkpoint import Checkpoint
from qwen_export.cli import main
from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_export.parity import ParityReport, open_place, verify
from qwen_runtime.backends.cuda import opening
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.backends.proof import ENGINE_TOLERANCES
from qwen_runtime.backends.registry import open_runner
from qwen_runtime.backends.tensorrt import opening as tensorrt_opening
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.errors import BundleError, RequestError
from qwen_runtime.lowered_description import LOWERED_FILE
from qwen_runtime.lowered_file import LoweredFolder

MODELS = Path(__file__).parents[1] / "data" / "golden" / "models"


@pytest.fixture
def host_as_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(opening, "load_seam", HostSeam)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def lowered(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Callable[..., Bundle]:
    """A copy of a golden bundle with graphs for CUDA."""

    def make(name: str, options: LoweringOptions) -> Bundle:
        bundle = Bundle.open(shutil.copytree(golden_bundle(name), tmp_path / "bundle"))
        lower_bundle(bundle, "cuda", options)
        return bundle

    return make


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def on_device(bundle: Bundle, checkpoint: Checkpoint) -> ParityReport:
    return verify(bundle, checkpoint, place=open_place(bundle, "onnxruntime", "cuda"))


@pytest.mark.slow
@pytest.mark.usefixtures("host_as_gpu")
def test_lowered_graphs_pass_in_fp32_and_every_control_is_told_apart(
    lowered: Callable[..., Bundle], golden_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    bundle = lowered("qwen2_sliding", LoweringOptions("fp32", "group_query"))
    report = on_device(bundle, golden_checkpoint("qwen2_sliding"))
    assert report.first_departure is None
    assert report.passed
    assert (report.backend, report.compute_dtype, report.tolerance) == (
        "onnxruntime",
        "fp32",
        1e-4,
    )
    assert report.device == HostSeam().device().name
    found = {case.key: case.positions for case in report.cases}
    assert "greedy on the prefill graph" not in found
    assert found["prefill whole"] > 0
    assert found["greedy decode"] > 0
    assert [control.key for control in report.controls if control.detected] == [
        "wrong theta", "swapped halves", "past_lengths off by one", "window too wide",
    ]  # fmt: skip
    assert report.quality is not None
    assert report.quality.top1_agreement == 1.0
    assert report.quality.mean_kl < 1e-9
    assert len(report.hashes["lowered/cuda/lowered.json"]) == 64
    report.write_pages(tmp_path)
    assert "in fp32 with ONNX Runtime on" in (tmp_path / "parity.html").read_text()
    assert json.loads((tmp_path / "parity.json").read_text())["backend"] == "onnxruntime"
    assert not (tmp_path / "reference.npz").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("host_as_gpu")
def test_fp16_is_held_to_its_own_tolerance_and_what_passes_is_proved(
    lowered: Callable[..., Bundle], golden_checkpoint: Callable[[str], Checkpoint]
) -> None:
    bundle = lowered("qwen2_untied", LoweringOptions("fp16"))
    with pytest.raises(BundleError, match="reference"):
        open_runner(bundle, device="cuda")
    report = on_device(bundle, golden_checkpoint("qwen2_untied"))
    # It has no reference to be proved with at a load, and needs none now.
    open_runner(bundle, device="cuda").close()
    assert report.passed, report.first_departure
    # Random weights: PyTorch's own rounding in fp16 is more than the embedded model's.
    assert ENGINE_TOLERANCES["fp16"].logit_error < report.tolerance <= 0.2
    assert "PyTorch itself in fp16" in report.tolerance_reason
    assert 1e-4 < report.max_error < report.tolerance
    assert report.quality is not None
    assert 0 < report.quality.mean_kl < 1e-3


@pytest.mark.usefixtures("host_as_gpu")
def test_a_graph_that_answers_wrongly_is_reported_and_not_refused_at_the_door(
    lowered: Callable[..., Bundle], golden_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    bundle = lowered("qwen2_sliding", LoweringOptions("fp32", "group_query"))
    path = LoweredFolder.open(bundle, "cuda").graph_file("decode")
    model = ir.load(path)
    for node in model.graph:
        if (
            node.op_type == "GroupQueryAttention"
            and node.attributes["local_window_size"].value > 0
        ):
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 5)
    ir.save(model, path)
    document = json.loads((path.parent / LOWERED_FILE).read_text())
    document["files"][path.name] = {
        "sha256": sha256_of(path),
        "num_bytes": path.stat().st_size,
    }
    (path.parent / LOWERED_FILE).write_text(json.dumps(document))
    report = on_device(bundle, golden_checkpoint("qwen2_sliding"))
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert not report.passed
    assert (report.first_departure or "").startswith("greedy decode, prompt ")


@pytest.mark.usefixtures("host_as_gpu")
def test_damaged_graphs_are_refused_and_not_measured(lowered: Callable[..., Bundle]) -> None:
    bundle = lowered("qwen2_untied", LoweringOptions("fp32", "group_query"))
    path = LoweredFolder.open(bundle, "cuda").graph_file("decode")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"decode\.onnx: sha256 must be"):
        open_place(bundle, "onnxruntime", "cuda")


def test_a_device_that_is_not_there_is_one_clear_error(
    lowered: Callable[..., Bundle],
) -> None:
    bundle = lowered("qwen2_untied", LoweringOptions())
    result = run("verify", bundle.path, MODELS / "qwen2_untied", "--device", "cuda")
    assert result.exit_code == 1
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("Error: ")]
    assert "CUDA" in line or "cuda" in line


def test_a_bundle_without_graphs_for_the_device_names_the_command_that_makes_them(
    golden_bundle: Callable[[str], Path],
) -> None:
    path = golden_bundle("qwen2_untied")
    result = run("verify", path, MODELS / "qwen2_untied", "--device", "cuda")
    assert result.exit_code == 1
    assert f"qwen-export engine {path} --target cuda" in result.stderr


def test_a_backend_that_does_not_run_on_the_device_is_wrong_usage(
    golden_bundle: Callable[[str], Path],
) -> None:
    path = golden_bundle("qwen2_untied")
    result = run("verify", path, "--backend", "tensorrt", "--device", "cpu")
    assert result.exit_code == 2
    assert 'device must be "cuda" for backend "tensorrt"' in result.stderr
    with pytest.raises(RequestError, match='device must be "cuda" for backend "tensorrt"'):
        open_place(Bundle.open(path), "tensorrt", "cpu")


@pytest.mark.slow
def test_an_engine_is_verified_within_its_capacity(
    golden_bundle: Callable[[str], Path],
    golden_checkpoint: Callable[[str], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    bundle = linked_bundle(golden_bundle("qwen2_untied"), tmp_path / "bundle")
    add_engine(bundle, capacity=40)
    monkeypatch.setattr(tensorrt_opening, "load_seam", lambda flavour: TensorRtDouble())
    place = open_place(bundle, "tensorrt", "cuda")
    report = verify(bundle, golden_checkpoint("qwen2_untied"), place=place)
    assert report.passed, report.first_departure
    assert report.backend == "tensorrt"
    assert report.compute_dtype == "bf16"
    assert max(len(p.tokens) + len(p.greedy_tokens) for p in report.prompts) <= 40
    assert "engines/tensorrt-rtx/engine.json" in report.hashes
