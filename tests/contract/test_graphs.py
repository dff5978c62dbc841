"""The embedded model's graphs as files: their interface, form and weights."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from safetensors import safe_open

from qwen_export.bundle import embedded_model
from qwen_runtime.bundle import Bundle

PHASES = ("prefill", "decode")
LAYERS, KV_HEADS, HEAD_DIM, VOCAB = 8, 2, 32, 4096
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture(scope="module")
def graphs(tiny_bundle: Bundle) -> dict[str, onnx.ModelProto]:
    return {
        phase: onnx.load(tiny_bundle.path / f"{phase}.onnx", load_external_data=False)
        for phase in PHASES
    }


def interface(values: Any) -> list[tuple[str, int, list[int | str]]]:
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]


def caches(prefix: str) -> list[tuple[str, int, list[int | str]]]:
    shape: list[int | str] = ["batch", KV_HEADS, "capacity", HEAD_DIM]
    return [
        (f"{prefix}.{layer}.{part}", FLOAT, shape)
        for layer in range(LAYERS)
        for part in ("key", "value")
    ]


# --- form ---------------------------------------------------------------------------------------


def test_prefill_has_exactly_the_designed_inputs_and_outputs(graphs):
    assert interface(graphs["prefill"].graph.input) == [
        ("input_ids", INT64, ["batch", "sequence"]),
        ("past_lengths", INT64, ["batch"]),
        ("logits_indices", INT64, ["batch", "num_logits"]),
        *caches("past_key_values"),
    ]
    assert interface(graphs["prefill"].graph.output) == [
        ("logits", FLOAT, ["batch", "num_logits", VOCAB]),
        *caches("present"),
    ]


def test_decode_has_exactly_the_designed_inputs_and_outputs(graphs):
    assert interface(graphs["decode"].graph.input) == [
        ("input_ids", INT64, ["batch", 1]),
        ("past_lengths", INT64, ["batch"]),
        *caches("past_key_values"),
    ]
    assert interface(graphs["decode"].graph.output) == [
        ("logits", FLOAT, ["batch", 1, VOCAB]),
        *caches("present"),
    ]


@pytest.mark.parametrize("phase", PHASES)
def test_node_names_mirror_module_paths(graphs, phase):
    names = [node.name for node in graphs[phase].graph.node]
    assert len(set(names)) == len(names)
    for layer in range(LAYERS):
        stem = f"/model/layers.{layer}"
        for path in (
            "input_layernorm/RMSNormalization",
            "self_attn/q_proj/MatMul",
            "self_attn/q_proj/Add",
            "self_attn/k_proj/MatMul",
            "self_attn/v_proj/MatMul",
            "self_attn/CachedAttention",
            "self_attn/o_proj/MatMul",
            "post_attention_layernorm/RMSNormalization",
            "mlp/gate_proj/MatMul",
            "mlp/up_proj/MatMul",
            "mlp/down_proj/MatMul",
        ):
            assert f"{stem}/{path}" in names
    assert {"/model/embed_tokens/Gather", "/model/norm/RMSNormalization", "/lm_head/Gemm"} <= set(
        names
    )
    for node in graphs[phase].graph.node:
        assert re.fullmatch(rf"(/[a-z_]+(\.\d+)?)*/{node.op_type}(_\d+)?", node.name)


@pytest.mark.parametrize("phase", PHASES)
def test_layer_nodes_use_their_own_weights(graphs, phase):
    for node in graphs[phase].graph.node:
        if node.op_type == "MatMul":
            path = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            assert node.input[1] == f"{path}.weight"


@pytest.mark.parametrize("phase", PHASES)
def test_graphs_hold_no_leftovers_of_the_trace(graphs, phase):
    graph = graphs[phase].graph
    counts = Counter(node.op_type for node in graph.node)
    assert counts["Identity"] == counts["Constant"] == counts["Cast"] == 0
    initializers = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        assert node.op_type != "Transpose" or node.input[0] not in initializers, node.name
    read = {name for node in graph.node for name in node.input}
    assert initializers <= read
    written = {name for node in graph.node for name in node.output}
    assert written <= read | {value.name for value in graph.output}
    assert not graph.doc_string
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


def test_decode_transposes_nothing(graphs):
    assert not [node.name for node in graphs["decode"].graph.node if node.op_type == "Transpose"]


@pytest.mark.parametrize("phase", PHASES)
def test_equal_constants_are_one_initializer(graphs, phase):
    inline = [
        (tensor.data_type, tuple(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes())
        for tensor in graphs[phase].graph.initializer
        if tensor.data_location != TensorProto.EXTERNAL
    ]
    assert len(set(inline)) == len(inline)
    assert max(len(data) for _, _, data in inline) <= 64


@pytest.mark.parametrize("phase", PHASES)
def test_only_standard_operators_and_the_attention_function_are_used(graphs, phase):
    model = graphs[phase]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 24, "qwen": 1}
    for node in model.graph.node:
        if node.domain == "":
            assert not onnx.defs.get_schema(node.op_type, 24, "").deprecated
        else:
            assert (node.domain, node.op_type) == ("qwen", "CachedAttention")
    calls = [node for node in model.graph.node if node.op_type == "CachedAttention"]
    assert len(calls) == LAYERS
    assert len({(call.input[3], call.input[4]) for call in calls}) == 1


@pytest.mark.parametrize("phase", PHASES)
def test_the_attention_function_is_standard_attention_under_a_mask(graphs, phase):
    (function,) = graphs[phase].functions
    assert (function.domain, function.name) == ("qwen", "CachedAttention")
    assert list(function.input) == ["q", "k", "v", "mask", "kv_lengths"]
    assert list(function.output) == ["y"]
    (node,) = function.node
    assert (node.domain, node.op_type) == ("", "Attention")
    assert list(node.input) == ["q", "k", "v", "mask"]
    assert list(node.output) == ["y"]
    assert not node.attribute
    call = next(node for node in graphs[phase].graph.node if node.op_type == "CachedAttention")
    (mask,) = [v for v in interface(graphs[phase].graph.value_info) if v[0] == call.input[3]]
    rows = "sequence" if phase == "prefill" else 1
    assert mask[1:] == (TensorProto.BOOL, ["batch", 1, rows, "capacity"])


# --- weights ------------------------------------------------------------------------------------


def ranges(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "weights.bin"
            offset, length = int(entries["offset"]), int(entries["length"])
            assert length == 4 * int(np.prod(tensor.dims))
            found[tensor.name] = (offset, length)
    return found


def test_both_graphs_use_every_byte_of_one_weights_file(tiny_bundle, graphs):
    prefill, decode = ranges(graphs["prefill"]), ranges(graphs["decode"])
    assert prefill == decode
    data = (tiny_bundle.path / "weights.bin").read_bytes()
    position = 0
    for offset, length in sorted(prefill.values()):
        padding = data[position:offset]
        assert offset % 64 == 0
        assert len(padding) < (4096 if length >= 1 << 20 else 64)
        assert not any(padding)
        position = offset + length
    assert position == len(data)


def test_a_tied_table_is_stored_once(graphs):
    for model in graphs.values():
        users = [n.op_type for n in model.graph.node if "model.embed_tokens.weight" in n.input]
        assert sorted(users) == ["Gather", "Gemm"]
        assert "lm_head.weight" not in ranges(model)


def test_the_weights_file_is_as_large_as_the_unique_parameters(tiny_bundle):
    with safe_open(embedded_model() / "model.safetensors", "numpy") as file:
        sizes = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    assert "lm_head.weight" not in sizes
    assert (tiny_bundle.path / "weights.bin").stat().st_size <= 1.01 * 4 * sum(sizes.values())


# --- checks of the format -----------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_the_checker_accepts_the_files(tiny_bundle, phase):
    onnx.checker.check_model(tiny_bundle.path / f"{phase}.onnx", full_check=True)


@pytest.mark.parametrize("phase", PHASES)
def test_strict_inference_from_nothing_gives_the_stored_shapes(graphs, phase):
    stored = {name: rest for name, *rest in interface(graphs[phase].graph.value_info)}
    bare = onnx.ModelProto()
    bare.CopyFrom(graphs[phase])
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(
        bare, check_type=True, strict_mode=True, data_prop=True
    )
    found = {name: rest for name, *rest in interface(inferred.graph.value_info)}
    outputs = {value.name for value in bare.graph.output}
    inner = {name for node in bare.graph.node for name in node.output} - outputs
    assert inner <= found.keys()
    assert inner <= stored.keys()
    for name in inner:
        dtype, shape = stored[name]
        assert dtype == found[name][0]
        assert all(shape), f"{name} has an unnamed dimension: {shape}"
        for ours, theirs in zip(shape, found[name][1], strict=True):
            # Where inference knows a size it is ours; where it invents a symbol it knows nothing.
            if isinstance(theirs, int) or not theirs.startswith("unk__"):
                assert ours == theirs or not theirs, f"{name}: {shape} against {found[name][1]}"
