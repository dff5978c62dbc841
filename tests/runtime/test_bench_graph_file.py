"""Weights read from ONNX files without the onnx package, and the bytes a step streams."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_runtime.bench.graph_file import read_external_tensors
from qwen_runtime.bench.streamed import StreamedBytes
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BundleError
from qwen_runtime.lowered_file import LoweredFolder


def test_tensors_are_those_that_onnx_reads(embedded_bundle: Path) -> None:
    path = embedded_bundle / "decode.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    expected = {}
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            readers = frozenset(n.op_type for n in graph.node if tensor.name in n.input)
            where = (int(place["offset"]), int(place["length"]))
            expected[tensor.name] = (tuple(tensor.dims), *where, readers)
    found = {
        tensor.name: (tensor.shape, tensor.offset, tensor.num_bytes, tensor.readers)
        for tensor in read_external_tensors(path)
    }
    assert len(found) == Bundle.open(embedded_bundle).manifest.weights.num_tensors
    assert found == expected


def test_a_cast_is_read_with_its_target(tmp_path: Path) -> None:
    tensors = {item.name: item for item in read_external_tensors(_graph_with_cast(tmp_path))}
    assert tensors["cast"].cast_to == TensorProto.FLOAT
    assert tensors["plain"].cast_to is None
    assert tensors["cast"].readers == {"Cast"}


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_cut_graph_is_refused_with_its_name(
    embedded_bundle: Path, tmp_path: Path, keep: float
) -> None:
    whole = (embedded_bundle / "decode.onnx").read_bytes()
    path = tmp_path / "decode.onnx"
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(BundleError, match=r"decode\.onnx must be a readable ONNX file") as caught:
        read_external_tensors(path)
    assert caught.value.path == path


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "decode.onnx"
    for content in (b"", b"\xff" * 64, b'{"a": 1}'):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="must be a readable ONNX file"):
            read_external_tensors(path)


def test_a_missing_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="must be a readable ONNX file"):
        read_external_tensors(tmp_path / "decode.onnx")


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen2_untied"])
def test_a_step_streams_every_parameter_but_rows_of_an_untied_embedding(
    golden_bundle: Callable[[str], Path], name: str
) -> None:
    bundle = Bundle.open(golden_bundle(name))
    model = bundle.manifest.model
    hidden, kv_size = model.hidden_size, model.num_key_value_heads * model.head_dim
    query_size = model.num_attention_heads * model.head_dim
    attention = 2 * hidden * query_size + 2 * hidden * kv_size + query_size + 2 * kv_size
    layer = attention + 3 * hidden * model.intermediate_size + 2 * hidden
    logits = model.vocab_size * hidden  # the embedding itself where it is tied
    streamed = StreamedBytes.of(bundle)
    assert streamed.weights == 4 * (model.num_hidden_layers * layer + hidden + logits)
    assert streamed.cache_per_token == 4 * 2 * model.num_hidden_layers * kv_size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_graph_for_the_cpu_streams_the_bytes_that_the_portable_one_does(
    precision: str, tied: bool, tmp_path: Path
) -> None:
    model = small_checkpoint(tmp_path / "model", tie_word_embeddings=tied, vocab_size=102)
    made = build(model, tmp_path / "out", BuildOptions(precision, verify=False))
    parts = {
        part.name: part.num_bytes
        for initializer in LoweredFolder.open(made, "cpu").description.initializers
        for part in initializer.parts
    }
    looked_up = ("model.rotary_emb.",) if tied else ("model.rotary_emb.", "model.embed_tokens.")
    read = sum(size for name, size in parts.items() if not name.startswith(looked_up))
    assert StreamedBytes.of(made).weights == read


def test_the_cache_adds_to_a_step_by_row_and_token() -> None:
    streamed = StreamedBytes(weights=1000, cache_per_token=10)
    assert streamed.step(1, 0) == 1000
    assert streamed.step(3, 7.5) == 1000 + 3 * 75


def test_weights_that_are_cast_count_as_what_is_loaded(
    golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = Bundle.open(golden_bundle("qwen2_tied"))
    path = _graph_with_cast(tmp_path)
    monkeypatch.setattr(Bundle, "file", lambda self, name: path)
    # "cast" grows from 2 to 4 bytes an element; "looked_up" is read by rows; "view" shares bytes.
    assert StreamedBytes.of(bundle).weights == 6 * 4 + 5 * 4


def _graph_with_cast(folder: Path) -> Path:
    def external(name: str, dtype: int, shape: list[int], offset: int) -> TensorProto:
        tensor = TensorProto(name=name, data_type=dtype, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        size = math.prod(shape) * (2 if dtype == TensorProto.FLOAT16 else 4)
        place = {"location": "weights.bin", "offset": str(offset), "length": str(size)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        return tensor

    nodes = [
        helper.make_node("Cast", ["cast"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["plain", "view"], ["b"]),
        helper.make_node("Gather", ["looked_up", "index"], ["c"], axis=1),
    ]
    weights = [
        external("cast", TensorProto.FLOAT16, [2, 3], 0),
        external("plain", TensorProto.FLOAT, [5], 64),
        external("view", TensorProto.FLOAT, [5, 1], 64),
        external("looked_up", TensorProto.FLOAT, [7, 2], 128),
        helper.make_tensor("index", TensorProto.INT64, [1], [0]),
    ]
    graph = helper.make_graph(nodes, "g", [], [], weights)
    path = folder / "cast.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path
