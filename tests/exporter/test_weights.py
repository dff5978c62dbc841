from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwen_export import weights
from qwen_export.errors import CheckpointError
from qwen_export.weights import (
    StoredTensor,
    TensorSource,
    WeightsFile,
    bind_weights,
    write_weights,
)

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def accept(name: str, block: np.ndarray) -> None:
    del name, block


def source(name: str, array: np.ndarray, *, transposed: bool = False) -> TensorSource:
    shape = array.shape[::-1] if transposed else array.shape
    return TensorSource(name, shape, lambda: array, transposed)


def random(*shape: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


def stored(file: WeightsFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    data = file.path.read_bytes()[tensor.offset : tensor.offset + tensor.num_bytes]
    return np.frombuffer(data, "<f4").reshape(tensor.shape)


def test_the_hash_made_while_writing_is_the_files(tmp_path):
    sources = [source("a", random(3, 5)), source("b", random(7)), source("c", random(2, 9))]
    file = write_weights(tmp_path / "weights.bin", sources, check=accept)
    data = file.path.read_bytes()
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.num_bytes == len(data)


def test_tensors_start_on_cache_lines_and_large_ones_on_pages(tmp_path):
    large = np.ones((1 << 18,), np.float32)
    sources = [source("a", random(3)), source("b", random(5)), source("big", large)]
    sources.append(source("c", random(1)))
    file = write_weights(tmp_path / "weights.bin", sources, check=accept)
    assert [tensor.offset for tensor in file.tensors.values()] == [0, 64, 4096, 4096 + (1 << 20)]
    assert file.num_bytes == 4096 + (1 << 20) + 4
    data = file.path.read_bytes()
    assert not any(data[12:64])
    assert not any(data[84:4096])
    for each in sources:
        assert np.array_equal(stored(file, each.name), each.read())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (13, 5), (5, 13), (64, 33)])
@pytest.mark.parametrize("block_bytes", [1, 64, 1 << 20])
def test_every_source_type_is_stored_as_float32_in_blocks(
    tmp_path, monkeypatch, dtype, transposed, shape, block_bytes
):
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    array = random(*shape, dtype=dtype)
    file = write_weights(
        tmp_path / "weights.bin", [source("w", array, transposed=transposed)], check=accept
    )
    expected = array.astype(np.float32)
    assert np.array_equal(stored(file, "w"), expected.T if transposed else expected)


@pytest.mark.parametrize(("transposed", "passes"), [(False, 20), (True, 4)])
def test_a_transposed_tensor_is_read_in_few_passes(tmp_path, monkeypatch, transposed, passes):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1)
    monkeypatch.setattr(weights, "MAX_PASSES", 4)
    blocks: list[int] = []
    write_weights(
        tmp_path / "weights.bin",
        [source("w", random(20, 20), transposed=transposed)],
        check=lambda _, block: blocks.append(len(block)),
    )
    assert len(blocks) == passes
    assert sum(blocks) == 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_keep_their_bits(tmp_path, dtype):
    array = np.array([0.0, -0.0, 2.0**-14, -1.5, 65280.0, 2.0**-24], np.float32).astype(dtype)
    file = write_weights(tmp_path / "weights.bin", [source("w", array)], check=accept)
    expected = array.astype(np.float32).view(np.uint32)
    assert np.array_equal(stored(file, "w").view(np.uint32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_check_sees_every_block_and_refuses_what_is_not_finite(
    tmp_path, monkeypatch, dtype, bad
):
    monkeypatch.setattr(weights, "BLOCK_BYTES", 16)
    array = random(6, 4, dtype=dtype)
    array[5, 3] = bad

    def check(name: str, block: np.ndarray) -> None:
        if not np.isfinite(block).all():
            raise CheckpointError(f"{name}: values must be finite")

    with pytest.raises(CheckpointError, match=r"model\.w: values must be finite"):
        write_weights(tmp_path / "weights.bin", [source("model.w", array)], check=check)


def test_progress_adds_up_and_sources_are_released_in_order(tmp_path):
    events: list[str] = []
    done: list[int] = []
    sources = [
        TensorSource(
            name,
            (4, 4),
            lambda name=name: (events.append(f"read {name}"), random(4, 4))[1],
            done=lambda name=name: events.append(f"done {name}"),
        )
        for name in ("a", "b")
    ]
    write_weights(tmp_path / "weights.bin", sources, check=accept, progress=done.append)
    assert events == ["read a", "done a", "read b", "done b"]
    assert sum(done) == sum(each.num_bytes for each in sources) == 128


def test_a_source_of_another_shape_is_a_bug(tmp_path):
    bad = TensorSource("w", (2, 3), lambda: random(3, 2))
    with pytest.raises(AssertionError, match=r"w: read \(3, 2\), layout says \(2, 3\)"):
        write_weights(tmp_path / "weights.bin", [bad], check=accept)


def test_an_existing_file_is_not_overwritten(tmp_path):
    path: Path = tmp_path / "weights.bin"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="File exists"):
        write_weights(path, [source("w", random(2))], check=accept)
    assert path.read_text() == "mine"


def graph(shape: list[int]) -> ir.Model:
    weight = ir.val("w", dtype=ir.DataType.FLOAT, shape=ir.Shape(shape))
    small = ir.tensor(np.array([1], np.int64), name="constant.int64[1]")
    constant = ir.val("constant.int64[1]", dtype=small.dtype, shape=small.shape, const_value=small)
    return ir.Model(
        ir.Graph([], [], nodes=[], initializers=[weight, constant], opset_imports={"": 24}),
        ir_version=10,
    )


def test_graphs_are_bound_to_the_file_and_keep_their_own_constants(tmp_path):
    array = random(5, 3)
    file = write_weights(
        tmp_path / "weights.bin", [source("pad", random(1)), source("w", array)], check=accept
    )
    model = graph([5, 3])
    bind_weights(model, file)
    bound = model.graph.initializers["w"].const_value
    assert isinstance(bound, ir.ExternalTensor)
    assert (bound.location, bound.offset, bound.length) == ("weights.bin", 64, 60)
    assert np.array_equal(bound.numpy(), array)
    kept = model.graph.initializers["constant.int64[1]"].const_value
    assert isinstance(kept, ir.Tensor)


def test_a_graph_and_a_file_of_different_shapes_are_a_bug(tmp_path):
    tensor = StoredTensor("w", (5, 3), 0, 60)
    file = WeightsFile(tmp_path / "weights.bin", {"w": tensor}, 60, "")
    with pytest.raises(AssertionError, match="w: the graph wants"):
        bind_weights(graph([3, 5]), file)
