"""The CUDA seam's own parts: what they ask of CUDA and ONNX Runtime, and the conversions beside it."""

from __future__ import annotations

import ast
import importlib
import inspect
import threading
import types
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from cuda_double import HostSeam

from qwen_runtime.backends import nvidia_device
from qwen_runtime.backends.cuda.blocks import block_around, rounded_slots
from qwen_runtime.backends.cuda.dlpack import ELEMENT_BYTES, tensor_at
from qwen_runtime.backends.cuda.nvidia import OnnxRuntimeCudaSeam
from qwen_runtime.backends.cuda.seam import NO_GRAPH, CudaSeam
from qwen_runtime.backends.device_seam import DeviceMemoryError
from qwen_runtime.backends.lowered_contents import initializer_bytes, pieces
from qwen_runtime.errors import BackendError, BundleError
from qwen_runtime.lowered_description import InitializerEntry, Layout, PartEntry

Dtype = Literal["float", "float16", "bfloat16", "int8", "uint8"]


@pytest.mark.parametrize("implementation", [OnnxRuntimeCudaSeam, HostSeam])
def test_the_seam_is_implemented_with_the_same_arguments(implementation: type) -> None:
    for name, wanted in inspect.getmembers(CudaSeam, inspect.isfunction):
        if not name.startswith("_"):
            found = inspect.signature(getattr(implementation, name))
            assert found == inspect.signature(wanted), name


def test_every_name_of_cuda_exists() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    tree = ast.parse(Path(nvidia_device.__file__).read_text("utf-8"))
    called = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "_call"
        and isinstance(node.args[0], ast.Constant)
    }
    assert len(called) > 10
    assert all(hasattr(cuda, name) for name in called)


class Recorded:
    """A session that notes what it is run with, or fails."""

    def __init__(self, error: str | None = None) -> None:
        self.error, self.runs, self.released = error, [], []

    def run_with_iobinding(self, binding: object, options: Any) -> None:
        names = ("gpu_graph_id", "disable_synchronize_execution_providers")
        self.runs.append([options.get_run_config_entry(name) for name in names])
        if self.error is not None:
            raise RuntimeError(self.error)

    def release_captured_graph(self, graph: int) -> None:
        self.released.append(graph)


@pytest.fixture
def seam() -> OnnxRuntimeCudaSeam:
    """The implementation over the real onnxruntime, whose calls here need no GPU."""
    loaded: list[bool] = []
    ort: Any = types.SimpleNamespace(
        RunOptions=onnxruntime.RunOptions,
        SessionOptions=onnxruntime.SessionOptions,
        preload_dlls=lambda: loaded.append(True),
    )
    made = OnnxRuntimeCudaSeam(ort, types.ModuleType("cuda"))
    assert loaded == [True]
    return made


def test_sessions_share_a_stream_and_only_some_are_captured(seam: OnnxRuntimeCudaSeam) -> None:
    [(name, options)] = seam.providers(77, capture=True, tf32=False)

    assert name == "CUDAExecutionProvider"
    assert options["user_compute_stream"] == "77"
    assert (options["enable_cuda_graph"], options["use_tf32"]) == ("1", "0")
    [(_, options)] = seam.providers(77, capture=False, tf32=True)
    assert (options["enable_cuda_graph"], options["use_tf32"]) == ("0", "1")


def test_no_node_may_run_on_the_cpu_unless_asked(seam: OnnxRuntimeCudaSeam) -> None:
    name = "session.disable_cpu_ep_fallback"

    assert seam.session_options().get_session_config_entry(name) == "1"
    assert seam.session_options(allow_cpu=True).get_session_config_entry(name) == "0"


def test_a_run_names_its_graph_and_does_not_wait(seam: OnnxRuntimeCudaSeam) -> None:
    session = Recorded()
    seam.run(session, None, 1, NO_GRAPH)
    seam.run(session, None, 1, 5)
    seam.release_graph(session, 5)

    assert session.runs == [["-1", "1"], ["5", "1"]]
    assert session.released == [5]


def test_sessions_run_on_one_thread_whoever_asks(seam: OnnxRuntimeCudaSeam) -> None:
    seen: list[int] = []

    class Session(Recorded):
        def run_with_iobinding(self, binding: object, options: Any) -> None:
            seen.append(threading.get_ident())

        def release_captured_graph(self, graph: int) -> None:
            seen.append(threading.get_ident())

    session = Session()
    callers = [threading.Thread(target=seam.run, args=(session, None, 1, 5)) for _ in range(3)]
    for caller in callers:
        caller.start()
        caller.join()
    seam.release_graph(session, 5)

    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert seen[0] != threading.get_ident()


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Failed to allocate memory for requested buffer of size 9", DeviceMemoryError),
        ("CUDA failure 2: out of memory", DeviceMemoryError),
        ("CUBLAS failure 13: the GPU program failed", BackendError),
    ],
)
def test_failures_of_a_run_are_told_apart(
    seam: OnnxRuntimeCudaSeam, words: str, kind: type[Exception]
) -> None:
    with pytest.raises(BackendError, match="could not run the graph") as error:
        seam.run(Recorded(words), None, 1, NO_GRAPH)
    assert type(error.value) is kind


# --- tensors over memory ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sorted(ELEMENT_BYTES))
def test_a_tensor_is_seen_where_it_lies(dtype: str) -> None:
    memory = np.arange(6 * ELEMENT_BYTES[dtype], dtype=np.uint8)

    value = tensor_at(onnxruntime, memory.ctypes.data, (2, 3), dtype, 1)

    assert (value.shape(), value.data_ptr()) == ([2, 3], memory.ctypes.data)
    assert value.data_type() == f"tensor({dtype})"
    assert value.device_name() == "cpu"


def test_a_tensor_of_the_gpu_is_known_as_such() -> None:
    assert tensor_at(onnxruntime, 1 << 20, (2, 3), "float16", 2).device_name() == "cuda"


def test_tensors_come_and_go_without_harm() -> None:
    memory = np.zeros(64, np.float32)
    kept = [tensor_at(onnxruntime, memory.ctypes.data, (4, 4, 4), "float", 1) for _ in range(500)]
    assert sum(value.shape()[0] for value in kept) == 2000
    del kept
    importlib.import_module("gc").collect()


# --- initialisers -------------------------------------------------------------------------------


def stored(path: Path, *arrays: np.ndarray) -> list[PartEntry]:
    """Write tensors to a weights file; int4 ones are given as signed codes in an int8 array."""
    parts, content = [], b""
    for index, array in enumerate(arrays):
        kind, data = {"f": "float", "i": "int8"}[array.dtype.kind], array.tobytes()
        parts.append(PartEntry(f"w{index}", kind, array.shape, len(content), len(data)))  # type: ignore[arg-type]  # of the two
        content += data
    path.write_bytes(content)
    return parts


def as_int4(path: Path, codes: np.ndarray) -> list[PartEntry]:
    flat = (codes.reshape(-1) & 15).astype(np.uint8)
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    data = flat[0::2] | (flat[1::2] << 4)
    path.write_bytes(data.tobytes())
    return [PartEntry("w", "int4", codes.shape, 0, data.size)]


def made(
    path: Path,
    parts: list[PartEntry],
    shape: tuple[int, ...],
    dtype: Dtype,
    *,
    layout: Layout = "plain",
    axis: int = 0,
    block_size: int | None = None,
) -> bytes:
    entry = InitializerEntry("w", dtype, shape, layout, tuple(parts), axis, block_size)
    content = b"".join(piece.tobytes() for piece in pieces(entry, path))
    assert len(content) == initializer_bytes(entry)
    return content


@pytest.fixture(params=[1 << 22, 7])
def piece_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("qwen_runtime.backends.lowered_contents._PIECE", request.param)
    return int(request.param)


@pytest.mark.usefixtures("piece_size")
def test_floats_are_rounded_to_the_nearest(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "weights.bin"
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, -0.0, 3e38], np.float32)
    values = np.append(rng.standard_normal(100).astype(np.float32), ties)
    small = np.where(np.abs(values) > 6e4, 0, values).astype(np.float32)

    parts = stored(path, values)
    assert made(path, parts, values.shape, "float") == values.tobytes()
    expected = values.astype(ml_dtypes.bfloat16)
    assert made(path, parts, values.shape, "bfloat16") == expected.tobytes()
    parts = stored(path, small)
    assert made(path, parts, small.shape, "float16") == small.astype(np.float16).tobytes()


@pytest.mark.usefixtures("piece_size")
@pytest.mark.parametrize("axis", [0, 1])
def test_parts_are_joined_along_an_axis(
    tmp_path: Path, rng: np.random.Generator, axis: int
) -> None:
    path = tmp_path / "weights.bin"
    shapes = [(6, 4), (6, 2), (6, 2)] if axis else [(4, 6), (2, 6), (2, 6)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    whole = np.concatenate(arrays, axis=axis).astype(np.float16)

    content = made(path, stored(path, *arrays), whole.shape, "float16", axis=axis)

    assert content == whole.tobytes()


@pytest.mark.usefixtures("piece_size")
@pytest.mark.parametrize(("bits", "outputs"), [(8, 6), (4, 6), (4, 5)])
def test_codes_take_the_form_that_the_operator_multiplies(
    tmp_path: Path, rng: np.random.Generator, bits: int, outputs: int
) -> None:
    path, block, inputs = tmp_path / "weights.bin", 16, 64
    high = 1 << (bits - 1)
    codes = rng.integers(-high, high, (inputs, outputs)).astype(np.int8)
    scales = rng.random((inputs // block, outputs), np.float32)
    parts = stored(path, codes) if bits == 8 else as_int4(path, codes)
    shape = (outputs, inputs // block, block * bits // 8)
    packed = made(path, parts, shape, "uint8", layout="matmul_nbits", axis=1, block_size=block)
    laid = made(
        path,
        stored(path, scales),
        (outputs, inputs // block),
        "float",
        layout="matmul_nbits_scales",
        axis=1,
    )
    feeds = {
        "x": rng.standard_normal((3, inputs)).astype(np.float32),
        "codes": np.frombuffer(packed, np.uint8).reshape(shape),
        "scales": np.frombuffer(laid, np.float32).reshape(outputs, -1),
    }
    (found,) = matmul_nbits(inputs, outputs, bits, block).run(None, feeds)

    weights = codes.astype(np.float32) * scales.repeat(block, axis=0)
    assert np.allclose(found, feeds["x"] @ weights, atol=1e-4)


def matmul_nbits(inputs: int, outputs: int, bits: int, block: int) -> Any:
    """ONNX Runtime's own operator, which says what the form is."""
    from onnx import TensorProto, helper

    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=block,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, inputs]),
            helper.make_tensor_value_info("codes", TensorProto.UINT8, [outputs, None, None]),
            helper.make_tensor_value_info("scales", TensorProto.FLOAT, [outputs, None]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, outputs])],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def test_a_number_that_does_not_fit_float16_names_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    parts = stored(path, np.array([1, -70000], np.float32))
    with pytest.raises(BackendError, match=r"w must fit float16.*got 70000.*--compute-dtype bf16"):
        made(path, parts, (2,), "float16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (3, 3)}, r"must make 36 bytes, but make 32"),
        ({"dtype": "uint8", "shape": (2, 4)}, r"plain cannot make uint8 of float"),
        ({"layout": "matmul_nbits"}, r"matmul_nbits takes codes of two dimensions"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "weights.bin"
    arguments: dict[str, Any] = {"shape": (2, 4), "dtype": "float"} | changes
    with pytest.raises(BundleError, match=message):
        made(path, stored(path, np.zeros((2, 4), np.float32)), **arguments)


def test_no_byte_is_given_out_beyond_the_initialiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_runtime.backends.lowered_contents._PIECE", 3)
    path = tmp_path / "weights.bin"
    parts = stored(path, np.zeros((2, 4), np.float32))
    entry = InitializerEntry("w", "float", (2, 2), "plain", tuple(parts))

    content = pieces(entry, path)
    assert next(content).nbytes == 12
    with pytest.raises(BundleError, match="w: its parts must make 16 bytes, but make 24 or more"):
        next(content)


# --- blocks -------------------------------------------------------------------------------------


def test_slots_are_allocated_in_few_sizes() -> None:
    assert [rounded_slots(n) for n in (1, 2, 3, 5, 8, 9, 17, 33)] == [1, 2, 4, 8, 8, 16, 24, 40]


@pytest.mark.parametrize("slots", [1, 4, 24, 40])
def test_a_block_covers_what_it_is_for_and_lies_within_the_slots(slots: int) -> None:
    lengths = np.zeros(slots, np.int64)
    for first in range(slots):
        for count in range(1, min(32, slots - first) + 1):
            start, size = block_around(first, count, lengths, 100)
            assert 0 <= start <= first
            assert first + count <= start + size <= slots
            assert size in (1, 2, 4, 8, 16, 32, slots)


def test_a_block_leaves_out_a_full_slot() -> None:
    lengths = np.array([3, 4, 100, 0])

    assert block_around(0, 3, np.zeros(4, np.int64), 100) == (0, 4)
    assert block_around(3, 1, lengths, 100) == (3, 1)
    assert block_around(0, 2, lengths, 100) == (0, 2)
    assert block_around(1, 1, lengths, 100) == (1, 1)
    assert block_around(0, 3, np.array([3, 4, 5, 100]), 100) == (0, 3)
