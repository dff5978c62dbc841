"""The seam: its implementation against the real bindings, and the double that stands in for it."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tensorrt_double import FaultError, TensorRtDouble
from tensorrt_engines import add_engine, linked_bundle

from qwen_runtime import LLM
from qwen_runtime.backends import nvidia_device
from qwen_runtime.backends.tensorrt import TensorRtRunner, nvidia
from qwen_runtime.backends.tensorrt.cache import DeviceCache
from qwen_runtime.backends.tensorrt.decoder import Decoder
from qwen_runtime.backends.tensorrt.loaded import _ELEMENT_BYTES, _REASONS, _TYPES
from qwen_runtime.backends.tensorrt.nvidia import NvidiaSeam, load_seam
from qwen_runtime.backends.tensorrt.seam import DeviceMemoryError, Seam
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError

PROMPT = np.arange(20)


def bindings(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = f"{name} is not installed ({error}): pip install 'qwen-export[tensorrt-rtx]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def trt() -> ModuleType:
    return bindings("tensorrt_rtx_bindings")


@pytest.fixture
def cuda() -> ModuleType:
    return bindings("cuda.bindings.runtime")


# --- the implementation -------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [NvidiaSeam, TensorRtDouble])
def test_the_seam_is_implemented_with_the_same_arguments(implementation: type) -> None:
    for name, wanted in inspect.getmembers(Seam, inspect.isfunction):
        if not name.startswith("_"):
            found = inspect.signature(getattr(implementation, name))
            assert found == inspect.signature(wanted), name


def source() -> ast.Module:
    """The implementation, without TensorRT and with it."""
    files = (nvidia_device.__file__, nvidia.__file__)
    return ast.parse("\n".join(Path(file).read_text("utf-8") for file in files))


def names_used(prefix: str) -> set[str]:
    """Dotted names that the implementation reads from a variable, without the variable."""
    found = set()
    for node in ast.walk(source()):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            parts.append(node.id)
        dotted = ".".join(reversed(parts))
        for start in (f"self._{prefix}.", f"{prefix}."):
            if dotted.startswith(start):
                found.add(dotted.removeprefix(start))
    return found


def test_every_name_of_cuda_exists(cuda: ModuleType) -> None:
    tree = source()
    called = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "_call"
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(called) > 20
    for dotted in called | names_used("cuda"):
        thing: Any = cuda
        for part in dotted.split("."):
            thing = getattr(thing, part)


def test_every_name_of_tensorrt_exists(trt: ModuleType) -> None:
    names = names_used("trt")
    assert "ExecutionContextAllocationStrategy.USER_MANAGED" in names
    for dotted in names:
        thing: Any = trt
        for part in dotted.split("."):
            thing = getattr(thing, part)
    assert {*_ELEMENT_BYTES, *_TYPES.values()} <= set(trt.DataType.__members__)
    assert set(_REASONS) == set(trt.EngineInvalidityDiagnostics.__members__)
    tree = source()
    methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    expected = {
        trt.ICudaEngine: {
            "get_tensor_name",
            "get_tensor_mode",
            "get_tensor_dtype",
            "get_tensor_shape",
            "get_tensor_profile_shape",
            "get_aliased_input_tensor",
            "get_device_memory_size_for_profile_v2",
            "create_runtime_config",
            "create_execution_context",
            "num_io_tensors",
        },
        trt.IExecutionContext: {
            "set_optimization_profile_async",
            "set_device_memory",
            "set_input_shape",
            "set_tensor_address",
            "get_tensor_address",
            "infer_shapes",
            "is_stream_capturable",
            "execute_async_v3",
            "engine",
        },
        trt.IRuntimeConfig: {
            "set_execution_context_allocation_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "create_runtime_cache",
            "set_runtime_cache",
        },
        trt.Runtime: {"deserialize_cuda_engine", "get_engine_validity", "engine_header_size"},
    }
    for kind, members in expected.items():
        assert members <= methods & set(dir(kind)), kind


def test_a_plan_that_is_none_is_known_without_a_driver(
    trt: ModuleType, cuda: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "engine.plan").write_bytes(b"no plan" * 20)

    assert "MALFORMED_ENGINE" in load_seam("tensorrt-rtx").validity(tmp_path / "engine.plan")


def test_without_a_driver_loading_says_so(
    trt: ModuleType, cuda: ModuleType, bundle: Bundle
) -> None:
    if cuda.cudaDriverGetVersion()[1]:
        pytest.skip("this machine has an NVIDIA driver")
    add_engine(bundle)

    with pytest.raises(BackendError, match=r"an NVIDIA driver for CUDA 13 is needed .* got none"):
        LLM(bundle, backend="tensorrt")


class Cuda:
    """CUDA's bindings, some calls of which answer as they are told."""

    def __init__(self, cuda: ModuleType, **answers: Any) -> None:
        self._cuda = cuda
        self.calls: list[tuple[Any, ...]] = []
        for name, answer in answers.items():
            setattr(self, name, self._answering(name, answer))

    def _answering(self, name: str, answer: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return answer

        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cuda, name)


def test_cudas_errors_become_ours(trt: ModuleType, cuda: ModuleType) -> None:
    out_of_memory = cuda.cudaError_t.cudaErrorMemoryAllocation
    lost = cuda.cudaError_t.cudaErrorIllegalAddress
    fake: Any = Cuda(
        cuda, cudaMalloc=(out_of_memory, None), cudaGetLastError=(lost,), cudaFree=(lost,)
    )
    seam = NvidiaSeam("tensorrt-rtx", trt, fake)

    with pytest.raises(DeviceMemoryError, match="cudaMalloc failed: cudaErrorMemoryAllocation, "):
        seam.malloc(64)
    assert fake.calls == [("cudaMalloc", 64), ("cudaGetLastError",)]
    with pytest.raises(BackendError, match="cudaFree failed: cudaErrorIllegalAddress, an illegal"):
        seam.free(1)


def test_copies_name_target_source_size_and_direction(trt: ModuleType, cuda: ModuleType) -> None:
    done = (cuda.cudaError_t.cudaSuccess,)
    fake: Any = Cuda(cuda, cudaMemcpyAsync=done, cudaMemcpy2DAsync=done, cudaMemsetAsync=done)
    seam = NvidiaSeam("tensorrt-rtx", trt, fake)
    kind = cuda.cudaMemcpyKind

    seam.to_device(1, 2, 3, 4)
    seam.to_host(1, 2, 3, 4)
    seam.on_device(1, 2, 3, 4)
    seam.on_device_2d(1, 2, pitch=30, width=20, height=5, stream=4)
    seam.zero(1, 3, 4)

    assert fake.calls == [
        ("cudaMemcpyAsync", 1, 2, 3, kind.cudaMemcpyHostToDevice, 4),
        ("cudaMemcpyAsync", 1, 2, 3, kind.cudaMemcpyDeviceToHost, 4),
        ("cudaMemcpyAsync", 1, 2, 3, kind.cudaMemcpyDeviceToDevice, 4),
        ("cudaMemcpy2DAsync", 1, 30, 2, 30, 20, 5, kind.cudaMemcpyDeviceToDevice, 4),
        ("cudaMemsetAsync", 1, 0, 3, 4),
    ]


def test_page_locked_memory_is_seen_without_a_copy(trt: ModuleType, cuda: ModuleType) -> None:
    memory = np.zeros(16, np.uint8)
    view = NvidiaSeam("tensorrt-rtx", trt, cuda).host_view(memory.ctypes.data + 4, 8)

    view[:] = 7

    assert memory.tolist() == [0] * 4 + [7] * 8 + [0] * 4


# --- what the double notices --------------------------------------------------------------------


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    return linked_bundle(golden_bundle("qwen2_untied"), tmp_path / "bundle")


@pytest.fixture
def opened(bundle: Bundle) -> tuple[TensorRtRunner, TensorRtDouble]:
    device = TensorRtDouble()
    return TensorRtRunner(bundle, add_engine(bundle), device), device


def decode_thrice(runner: TensorRtRunner) -> np.ndarray:
    runner.allocate(2, 1)
    runner.prefill([0, 1], [PROMPT, PROMPT], [0, 0], [1, 1])
    for step in range(3):
        logits = runner.decode([0, 1], [step, step])
    return logits


def test_a_missing_wait_reads_poison(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, device = opened
    assert np.isfinite(decode_thrice(runner)).all()
    runner.allocate(3, 1)
    monkeypatch.setattr(device, "synchronise", lambda stream: None)

    assert np.isnan(runner.decode([0, 1], [1, 2])).all()


def test_caches_that_are_not_cleared_spoil_the_logits(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, device = opened
    monkeypatch.setattr(device, "zero", lambda *_: None)

    assert np.isnan(decode_thrice(runner)).any()


def test_graphs_that_outlive_their_caches_are_noticed(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = opened
    decode_thrice(runner)
    monkeypatch.setattr(Decoder, "forget", lambda self: None)
    runner.allocate(4, 1)

    with pytest.raises(FaultError, match="not inside"):
        runner.decode([0, 1], [1, 2])


def test_an_address_that_changes_after_the_capture_is_noticed(
    opened: tuple[TensorRtRunner, TensorRtDouble],
) -> None:
    runner, device = opened
    decode_thrice(runner)
    captured = max(device.contexts)
    device.set_address(captured, "logits", device.contexts[captured].addresses["logits"] + 256)

    with pytest.raises(FaultError, match="changed after a graph was captured"):
        runner.decode([0, 1], [1, 2])


def test_a_capture_without_a_run_before_it_is_noticed(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = opened
    step = Decoder._step
    calls: list[int] = []

    def skipping(self: Decoder, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) != 2:
            step(self, *arguments)

    monkeypatch.setattr(Decoder, "_step", skipping)
    with pytest.raises(FaultError, match="captured before the context had run"):
        decode_thrice(runner)


def test_caches_bound_to_two_places_are_noticed(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = opened
    addresses = DeviceCache.addresses

    def apart(self: DeviceCache, first: int) -> Iterator[tuple[str, int]]:
        for name, address in addresses(self, first):
            yield name, address + 256 * name.startswith("present.1")

    monkeypatch.setattr(DeviceCache, "addresses", apart)
    with pytest.raises(
        FaultError, match=r"present\.1\.key and past_key_values\.1\.key were bound to"
    ):
        decode_thrice(runner)


def test_a_slot_beside_the_one_meant_is_noticed_at_the_end_of_the_buffer(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = opened
    addresses = DeviceCache.addresses
    monkeypatch.setattr(DeviceCache, "addresses", lambda self, first: addresses(self, first + 1))

    with pytest.raises(FaultError, match="are not inside device memory"):
        decode_thrice(runner)


def test_an_unbound_tensor_is_refused(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = opened
    monkeypatch.setattr(DeviceCache, "addresses", lambda self, first: iter(()))

    with pytest.raises(BackendError, match=r"must be bound, got none for past_key_values\.0\.key"):
        decode_thrice(runner)


def test_a_shape_outside_the_profile_is_refused(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = opened
    wide = runner._decode_limits.__class__(64, 4, 32, 8)
    monkeypatch.setattr(runner, "_call_limits", wide)

    with pytest.raises(BackendError, match=r"input_ids the shape \(2, 20\): profile 0 takes"):
        decode_thrice(runner)


def test_tokens_past_the_end_of_a_slot_are_noticed(
    opened: tuple[TensorRtRunner, TensorRtDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = opened
    decode_thrice(runner)
    runner.truncate(1, 64)

    monkeypatch.setattr("qwen_runtime.backends.tensorrt.runner.decode_spans", lambda *_: [(0, 2)])
    with pytest.raises(FaultError, match="do not fit into 64"):
        runner.decode([0], [1])


@pytest.mark.parametrize("what", ["free", "host_free"])
def test_memory_freed_under_pending_work_is_noticed(what: str) -> None:
    device = TensorRtDouble()
    stream = device.new_stream()
    address = {"free": device.malloc, "host_free": device.host_malloc}[what](64)
    device.zero(device.malloc(64), 64, stream)

    with pytest.raises(FaultError, match="freed while work was pending"):
        getattr(device, what)(address)
