"""What stands in the way of `LLM(bundle, device="cuda")`: named, with what to do, and nothing leaks."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cuda_double import HostSeam
from tensorrt_engines import linked_bundle

from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_runtime import LLM, BackendError, BundleError
from qwen_runtime.backends.cuda import CudaRunner, nvidia, opening
from qwen_runtime.backends.cuda.seam import NO_GRAPH
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.lowered_description import LOWERED_FILE
from qwen_runtime.lowered_file import LoweredFolder


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    return linked_bundle(golden_bundle("qwen2_untied"), tmp_path / "bundle")


@pytest.fixture
def folder(bundle: Bundle) -> LoweredFolder:
    options = LoweringOptions(compute_dtype="fp32", attention="group_query")
    return lower_bundle(bundle, "cuda", options)


def edited(folder: LoweredFolder, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what lowered.json says."""
    path = folder.path / LOWERED_FILE
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def edit_graph(
    folder: LoweredFolder, change: Callable[[onnx.ModelProto], object]
) -> LoweredFolder:
    """Change decode.onnx, and lowered.json to fit."""
    path = folder.path / "decode.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())

    def describe(raw: dict[str, Any]) -> None:
        raw["files"]["decode.onnx"] = {
            "sha256": sha256_of(path),
            "num_bytes": path.stat().st_size,
        }

    edited(folder, describe)
    return LoweredFolder.read(folder.path)


def assert_refused(
    bundle: Bundle, folder: LoweredFolder, seam: HostSeam, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        CudaRunner(bundle, folder, seam)
    assert seam.leaks() == {}


# --- the machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ({"cuda_versions": (0, 13050)}, "driver for CUDA 13 is needed .* or use device='cpu'"),
        ({"cuda_versions": (12080, 13050)}, r"must serve CUDA 13, got one for CUDA 12\.8; update"),
        ({"gpus": 0}, "CUDA GPU is needed .*CUDA finds no GPU; check CUDA_VISIBLE_DEVICES"),
        ({"memory": 1000}, "bytes of GPU memory for its weights.*--precision int8 or int4"),
    ],
)
def test_a_machine_that_cannot_run_it_is_named(
    bundle: Bundle, folder: LoweredFolder, device: dict[str, Any], message: str
) -> None:
    assert_refused(bundle, folder, HostSeam(**device), BackendError, message)


def test_bf16_needs_a_gpu_that_has_it(bundle: Bundle) -> None:
    folder = lower_bundle(bundle, "cuda", LoweringOptions(compute_dtype="bf16"))

    assert_refused(bundle, folder, HostSeam(sm=75), BackendError, "SM 80.*got SM 75.*fp16")


def test_onnxruntime_without_cuda_names_the_package_that_has_it() -> None:
    with pytest.raises(
        BackendError, match=r"without CUDAExecutionProvider.*pip uninstall.*qwen-export\[cuda\]"
    ):
        nvidia.load_seam()


def test_a_missing_onnxruntime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime must be installed.*qwen-export\[cuda\]"):
        nvidia.load_seam()


def test_missing_bindings_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["CUDAExecutionProvider"]
    fake = types.SimpleNamespace(get_available_providers=lambda: names, preload_dlls=lambda: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match=r"cuda\.bindings.*qwen-export\[cuda\]"):
        nvidia.load_seam()


def test_every_failed_allocation_is_an_error_of_ours_and_leaks_nothing(
    bundle: Bundle, folder: LoweredFolder
) -> None:
    whole = HostSeam()
    CudaRunner(bundle, folder, whole).close()
    for number in range(1, whole.counts["allocation"] + 1):
        seam = HostSeam(fail_at=number)
        assert_refused(bundle, folder, seam, BackendError, "free ones on the GPU")


def test_memory_that_ends_in_a_step_says_what_to_lower(
    bundle: Bundle, folder: LoweredFolder
) -> None:
    tokens = [np.array([1, 2])]
    message = r"no GPU memory left for 1 rows.*prefix_cache_slots"
    in_prefill, in_decode = HostSeam(fail_run_at=1), HostSeam(fail_run_at=2)
    runners = [CudaRunner(bundle, folder, seam) for seam in (in_prefill, in_decode)]
    for runner in runners:
        runner.allocate(1, 1)

    with pytest.raises(BackendError, match=message):
        runners[0].prefill([0], tokens, [0], [1])
    runners[1].prefill([0], tokens, [0], [1])
    with pytest.raises(BackendError, match=message):
        runners[1].decode([0], [3])

    for runner, seam in zip(runners, (in_prefill, in_decode), strict=True):
        runner.close()
        assert seam.leaks() == {}


# --- the graphs ---------------------------------------------------------------------------------


class Numbered(HostSeam):
    """Notes the number of every run's graph."""

    def __init__(self, **device: Any) -> None:
        super().__init__(**device)
        self.numbers: list[int] = []

    def run(self, session: Any, binding: Any, stream: int, graph: int) -> None:
        self.numbers.append(graph)
        super().run(session, binding, stream, graph)


def test_a_graph_whose_capture_failed_is_captured_anew_under_another_number(
    bundle: Bundle, folder: LoweredFolder
) -> None:
    seam = Numbered(fail_run_at=3)
    runner = CudaRunner(bundle, folder, seam)
    runner.allocate(1, 1)
    runner.prefill([0], [np.arange(4)], [0], [1])
    runner.decode([0], [5])
    with pytest.raises(BackendError, match="no GPU memory left for 1 rows"):
        runner.decode([0], [6])

    found = [runner.decode([0], [6]).copy() for _ in range(3)]

    assert seam.numbers == [NO_GRAPH, NO_GRAPH, 1, NO_GRAPH, 2, 2]
    assert np.isfinite(found).all()
    runner.close()
    assert seam.leaks() == {}


def test_a_bundle_without_graphs_for_cuda_names_the_command(bundle: Bundle) -> None:
    with pytest.raises(
        BundleError, match=rf"no graphs for cuda.*qwen-export engine {bundle.path} --target cuda"
    ):
        LLM(bundle, device="cuda")


def test_graphs_of_other_weights_are_refused(bundle: Bundle, folder: LoweredFolder) -> None:
    edited(folder, lambda raw: raw.update(weights_sha256="0" * 64))
    with pytest.raises(BundleError, match=r"made for this bundle's weights.bin.*--overwrite"):
        LoweredFolder.open(bundle, "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(more=1), "'more' was unexpected.*damaged or was edited"),
        (lambda raw: raw.update(schema_version=2), "at most 1, got 2; install a newer"),
        (lambda raw: raw["files"].pop("decode.onnx"), "decode.onnx must be listed under files"),
        (
            lambda raw: raw["files"]["decode.onnx"].update(num_bytes=3),
            "size must be 3 bytes, got .*copy them again",
        ),
        (
            lambda raw: raw["initializers"][0]["parts"][0].update(offset=1 << 40),
            "must lie in the .* bytes of weights.bin",
        ),
    ],
)
def test_a_damaged_description_is_refused(
    bundle: Bundle,
    folder: LoweredFolder,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    edited(folder, change)
    with pytest.raises(BundleError, match=message):
        LoweredFolder.open(bundle, "cuda")


def test_a_changed_graph_is_found_by_its_hash(folder: LoweredFolder) -> None:
    path = folder.graph_file("prefill")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"prefill\.onnx: sha256 must be .*make them again"):
        folder.check_hashes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: raw["graphs"]["decode"]["inputs"][0].update(name="position_ids"),
            "got position_ids of type int64",
        ),
        (lambda raw: raw["graphs"]["decode"]["outputs"].pop(), "got no "),
        (
            lambda raw: raw["graphs"]["prefill"]["inputs"][0].update(dtype="int32"),
            "input_ids of type int32",
        ),
    ],
)
def test_inputs_and_outputs_that_nobody_knows_are_named(
    bundle: Bundle,
    folder: LoweredFolder,
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    edited(folder, change)
    opened = LoweredFolder.open(bundle, "cuda")
    assert_refused(bundle, opened, HostSeam(), BundleError, message)


def test_parts_that_do_not_make_the_initialiser_are_refused(
    bundle: Bundle, folder: LoweredFolder
) -> None:
    edited(folder, lambda raw: raw["initializers"][0]["shape"].append(2))
    opened = LoweredFolder.open(bundle, "cuda")
    assert_refused(bundle, opened, HostSeam(), BundleError, "parts must make .* bytes, but make")


def test_an_initialiser_that_was_not_supplied_is_an_error_and_not_garbage(
    bundle: Bundle, folder: LoweredFolder
) -> None:
    edited(folder, lambda raw: raw["initializers"].pop())
    opened = LoweredFolder.open(bundle, "cuda")
    assert_refused(bundle, opened, HostSeam(), BackendError, "could not load .*out of bounds")


def test_a_node_without_a_kernel_on_the_device_is_named(
    bundle: Bundle, folder: LoweredFolder
) -> None:
    # A provider without any kernels: every node would run on the CPU.
    seam = HostSeam(
        providers=["AzureExecutionProvider"],
        entries={"session.disable_cpu_ep_fallback": "1"},
    )
    assert_refused(
        bundle,
        folder,
        seam,
        BackendError,
        r"must run on the GPU, but .*\(GroupQueryAttention\).*--over",
    )


def test_a_graph_that_is_no_graph_says_which(bundle: Bundle, folder: LoweredFolder) -> None:
    def empty(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "Nothing"

    broken = edit_graph(folder, empty)
    assert_refused(bundle, broken, HostSeam(), BackendError, r"could not load .*decode\.onnx")


def test_an_old_onnxruntime_is_refused(
    bundle: Bundle, folder: LoweredFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited(folder, lambda raw: raw["minimum_engine_versions"].update(onnxruntime="99.0"))
    monkeypatch.setattr(opening, "load_seam", HostSeam)
    with pytest.raises(BackendError, match=r"at least 99\.0.*qwen-export\[cuda\]"):
        opening.open_cuda(bundle)
