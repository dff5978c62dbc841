from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qwen_export import passes
from qwen_export.errors import TargetError
from qwen_export.passes.retype import COMPUTE_DTYPES, fix_capacity, retype

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
SCOPES = "pkg.torch.onnx.name_scopes"


def value(name: str, shape: list[int | str | None], dtype: ir.DataType = FLOAT) -> ir.Value:
    return ir.val(name, dtype=dtype, shape=ir.Shape(shape))


def node(op_type: str, inputs: list[ir.Value | None], output: ir.Value, **attributes) -> ir.Node:
    return ir.node(op_type, inputs, attributes=attributes, outputs=[output])


def model(
    inputs: list[ir.Value], outputs: list[ir.Value], nodes: list[ir.Node], **initializers: ir.Value
) -> ir.Model:
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports={"": 24},
        name="graph",
    )
    return ir.Model(graph, ir_version=10)


def constant(array: np.ndarray, name: str) -> ir.Node:
    output = value(name, list(array.shape), ir.DataType.from_numpy(array.dtype))
    return node("Constant", [], output, value=ir.tensor(array))


# --- constants ----------------------------------------------------------------------------------


def test_equal_constants_become_one_initializer_and_others_stay_apart():
    x = value("x", ["n"], INT64)
    nodes = [
        constant(np.array([1], np.int64), "a"),
        constant(np.array([1], np.int64), "b"),
        constant(np.array(1, np.int64), "scalar"),
        constant(np.array([1.0], np.float32), "float"),
    ]
    a, b, scalar, float_ = (n.outputs[0] for n in nodes)
    y, z, w = value("y", ["n"], INT64), value("z", ["n"], INT64), value("w", [1])
    nodes += [node("Add", [x, a], y), node("Add", [y, b], z), node("Identity", [float_], w)]
    v = value("v", ["n"], INT64)
    nodes.append(node("Add", [z, scalar], v))
    graph = model([x], [v, w], nodes)
    passes.share_constants(graph)
    assert [n.op_type for n in graph.graph] == ["Add", "Add", "Identity", "Add"]
    assert list(graph.graph.initializers) == [
        "constant.int64[1]",
        "constant.int64(1)",
        "constant.float32[1.0]",
    ]
    first, second, _, last = graph.graph
    assert first.inputs[1] is second.inputs[1]
    assert last.inputs[1] is not first.inputs[1]


def test_constants_given_as_integers_keep_their_values():
    x, y = value("x", [2, 3]), value("y", [3, 2])
    shape = value("shape", [2], INT64)
    graph = model(
        [x], [y], [node("Constant", [], shape, value_ints=[3, 2]), node("Reshape", [x, shape], y)]
    )
    passes.share_constants(graph)
    (initializer,) = graph.graph.initializers.values()
    assert initializer.const_value is not None
    assert initializer.const_value.numpy().tolist() == [3, 2]
    assert initializer.dtype == INT64


# --- dimensions ---------------------------------------------------------------------------------


def test_the_tracers_symbols_get_the_names_users_know():
    ids = value("input_ids", ["s16", "s70"], INT64)
    past = value("past_lengths", ["s16"], INT64)
    indices = value("logits_indices", ["s16", "s5"], INT64)
    cache = value("past_key_values.0.key", ["s16", 2, "s91", 32])
    out = value("out", ["s16", "s70", "s91", 7])
    graph = model([ids, past, indices, cache], [out], [node("Add", [ids, past], out)])
    passes.name_dimensions(graph)
    shapes = [str(v.shape) for v in (ids, past, indices, cache, out)]
    assert shapes == [
        "[batch,sequence]",
        "[batch]",
        "[batch,num_logits]",
        "[batch,2,capacity,32]",
        "[batch,sequence,capacity,7]",
    ]


def counted(x: ir.Value, axis: int, step: int = 1) -> list[ir.Node]:
    """Range(0, size of x along an axis, step), its length invented by shape inference."""
    shape = value(f"shape{axis}", [1], INT64)
    limit = value(f"limit{axis}", [], INT64)
    start, by = (
        ir.val(f"{n}{axis}", const_value=ir.tensor(np.array(n, np.int64))) for n in (0, step)
    )
    return [
        node("Shape", [x], shape, start=axis, end=axis + 1),
        node("Squeeze", [shape], limit),
        node("Range", [start, limit, by], value(f"range{axis}", [f"unk__{axis}"], INT64)),
    ]


def test_sizes_that_inference_invents_are_named_after_what_they_count():
    x = value("x", ["batch", "sequence", 8])
    width = ir.val("width", const_value=ir.tensor(np.array([-1, 8], np.int64)))
    rows, negated = value("rows", ["unk__7", 8]), value("negated", ["unk__7", 8])
    nodes = [node("Reshape", [x, width], rows), node("Neg", [rows], negated)]
    graph = model([x], [negated], [*counted(x, 0), *counted(x, 1), *nodes])
    passes.name_derived_dimensions(graph)
    shapes = {out.name: str(out.shape) for each in graph.graph for out in each.outputs}
    assert shapes["range0"] == "[batch]"
    assert shapes["range1"] == "[sequence]"
    assert shapes["rows"] == shapes["negated"] == "[batch*sequence,8]"


def test_sizes_that_cannot_be_followed_keep_their_invented_names():
    x = value("x", ["batch", "sequence", 8])
    narrow = ir.val("narrow", const_value=ir.tensor(np.array([-1, 4], np.int64)))
    rows = value("rows", ["unk__7", 4])
    graph = model([x], [rows], [*counted(x, 1, step=2), node("Reshape", [x, narrow], rows)])
    passes.name_derived_dimensions(graph)
    shapes = {out.name: str(out.shape) for each in graph.graph for out in each.outputs}
    assert shapes["range1"] == "[unk__1]"
    assert shapes["rows"] == "[unk__7,4]"


# --- names --------------------------------------------------------------------------------------


def test_nodes_and_values_are_named_after_their_modules():
    x, y, z, w = (value(name, ["n"]) for name in "xyzw")
    nodes = [node("Add", [x, x], y), node("Add", [y, y], z), node("Add", [z, z], w)]
    for n, scopes in zip(
        nodes,
        (
            ["", "model", "model.layers.3.self_attn.q_proj", "add"],
            ["", "model", "model.layers.3.self_attn.q_proj", "add_1"],
            ["", "add_2"],
        ),
        strict=True,
    ):
        n.metadata_props[SCOPES] = repr(scopes)
    graph = model([x], [w], nodes)
    passes.name_after_modules(graph)
    assert [n.name for n in graph.graph] == [
        "/model/layers.3/self_attn/q_proj/Add",
        "/model/layers.3/self_attn/q_proj/Add_1",
        "/Add",
    ]
    assert y.name == "/model/layers.3/self_attn/q_proj/Add_output_0"
    assert w.name == "w"


def test_a_node_of_no_module_is_named_after_its_operator():
    x, y = value("x", ["n"]), value("y", ["n"])
    graph = model([x], [y], [node("Neg", [x], y)])
    passes.name_after_modules(graph)
    assert [n.name for n in graph.graph] == ["/Neg"]


# --- the attention function -----------------------------------------------------------------


def test_the_attention_function_takes_mask_and_lengths_and_uses_the_mask():
    x, y = value("x", ["n"]), value("y", ["n"])
    graph = model([x], [y], [node("Neg", [x], y)])
    passes.define_cached_attention(graph)
    assert graph.opset_imports["qwen"] == 1
    (function,) = graph.functions.values()
    assert [v.name for v in function.inputs] == ["q", "k", "v", "mask", "kv_lengths"]
    (attention,) = list(function)
    assert attention.op_type == "Attention"
    assert [v.name for v in attention.inputs if v is not None] == ["q", "k", "v", "mask"]


def test_a_value_without_a_shape_is_a_failed_inference():
    x = value("x", [2, 3])
    y = ir.Value(name="y")
    shape = value("shape", ["n"], INT64)
    graph = model([x, shape], [y], [node("NoSuchOperator", [x, shape], y)])
    with pytest.raises(AssertionError, match="shape inference failed at y"):
        passes.infer_shapes(graph)


# --- retype -------------------------------------------------------------------------------------


def retypable(weight: ir.TensorProtocol) -> ir.Model:
    """norm(-x) @ w + a cache read by its rotary table, what retyping and capacities need."""
    x, cache = value("x", ["batch", 4]), value("past", ["batch", 1, "capacity", 4])
    ids = value("ids", ["batch"], INT64)
    w = ir.val("w", dtype=weight.dtype, shape=ir.Shape(weight.shape.numpy()), const_value=weight)
    table = np.ones((16, 2), np.float32)
    cos = ir.val("cos", dtype=FLOAT, shape=ir.Shape([16, 2]), const_value=ir.tensor(table))
    present = value("present", ["batch", 1, "capacity", 4])
    logits = value("logits", ["batch", 4])
    ones = ir.tensor(np.ones(4, np.float32))
    scale = ir.val("scale", dtype=FLOAT, shape=ir.Shape([4]), const_value=ones)
    hidden, normed = value("hidden", ["batch", 4]), value("normed", ["batch", 4])
    negative = node("Neg", [x], hidden)
    norm = node("RMSNormalization", [hidden, scale], normed)
    rotary = node("RotaryEmbedding", [cache, cos, cos, ids], present)
    matmul = node("MatMul", [normed, w], logits)
    negative.name, norm.name = "/model/Neg", "/model/norm/RMSNormalization"
    rotary.name, matmul.name = "/rotary/RotaryEmbedding", "/lm_head/MatMul"
    nodes = [negative, norm, rotary, matmul]
    return model([x, cache, ids], [logits, present], nodes, w=w, cos=cos, scale=scale)


def lazy(array: np.ndarray, calls: list[str]) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        calls.append("read")
        return ir.tensor(array, name="w")

    return ir.LazyTensor(read, FLOAT, ir.Shape(array.shape), name="w")


WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4) / 3 - 2


@pytest.mark.parametrize(
    ("name", "numpy_dtype"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)]
)
def test_retype_changes_every_float_and_casts_logits_back(name, numpy_dtype):
    graph = retypable(ir.tensor(WEIGHT, name="w"))
    retype(graph, COMPUTE_DTYPES[name])
    dtype = COMPUTE_DTYPES[name]
    x, cache, ids = graph.graph.inputs
    logits, present = graph.graph.outputs
    assert [v.dtype for v in (x, cache, ids)] == [dtype, dtype, INT64]
    assert [v.dtype for v in (logits, present)] == [FLOAT, dtype]
    cast = logits.producer()
    assert cast is not None
    assert (cast.op_type, cast.name, logits.name) == ("Cast", "/lm_head/Cast", "logits")
    assert cast.attributes["to"].as_int() == FLOAT
    assert cast.inputs[0] is not None
    assert (cast.inputs[0].name, cast.inputs[0].dtype) == ("/lm_head/MatMul_output_0", dtype)
    weight = graph.graph.initializers["w"]
    assert weight.const_value is not None
    assert weight.dtype == weight.const_value.dtype == dtype
    assert np.array_equal(weight.const_value.numpy(), WEIGHT.astype(numpy_dtype))


def test_retype_reads_no_weight_and_keeps_none():
    calls: list[str] = []
    graph = retypable(lazy(WEIGHT, calls))
    retype(graph, COMPUTE_DTYPES["bf16"])
    assert calls == []
    weight = graph.graph.initializers["w"].const_value
    assert weight is not None
    assert weight.numpy() is not weight.numpy()
    assert len(calls) == 2


def test_retype_casts_in_blocks_as_in_one_piece(monkeypatch):
    monkeypatch.setattr("qwen_export.passes.retype._BLOCK_VALUES", 5)
    graph = retypable(ir.tensor(WEIGHT, name="w"))
    retype(graph, COMPUTE_DTYPES["fp16"])
    weight = graph.graph.initializers["w"].const_value
    assert weight is not None
    assert np.array_equal(weight.numpy(), WEIGHT.astype(np.float16))


def test_retype_leaves_integer_weights_alone():
    integers = ir.tensor(np.arange(16, dtype=np.int8).reshape(4, 4), name="w")
    graph = retypable(integers)
    retype(graph, COMPUTE_DTYPES["bf16"])
    assert graph.graph.initializers["w"].const_value is integers


@pytest.mark.parametrize("bad", [70000.0, -70000.0, np.inf, np.nan])
def test_a_weight_outside_fp16_is_refused_when_it_is_cast(bad):
    weight = WEIGHT.copy()
    weight[1, 2] = bad
    graph = retypable(ir.tensor(weight, name="w"))
    retype(graph, COMPUTE_DTYPES["fp16"])
    tensor = graph.graph.initializers["w"].const_value
    assert tensor is not None
    with pytest.raises(
        TargetError, match=r"w: values must be within ±65504 for float16"
    ) as caught:
        tensor.numpy()
    assert caught.value.names == ("w",)


def test_bf16_takes_what_fp16_cannot():
    weight = WEIGHT * 1e30
    graph = retypable(ir.tensor(weight, name="w"))
    retype(graph, COMPUTE_DTYPES["bf16"])
    tensor = graph.graph.initializers["w"].const_value
    assert tensor is not None
    assert np.isfinite(tensor.numpy().astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [FLOAT, ir.DataType.INT8])
def test_other_types_are_refused(dtype):
    with pytest.raises(TargetError, match=f"retyped to bf16 or fp16, got {dtype}"):
        retype(retypable(ir.tensor(WEIGHT, name="w")), dtype)


def add_cast(graph: ir.Model) -> None:
    graph.graph.append(node("Cast", [graph.graph.inputs[2]], value("f", ["batch"]), to=FLOAT))
    graph.graph[-1].name = "/Cast"


def add_constant(graph: ir.Model) -> None:
    graph.graph.append(constant(np.ones(1, np.float32), "c"))
    graph.graph[-1].name = "/Constant"


@pytest.mark.parametrize(
    ("add", "message"),
    [(add_cast, "/Cast: Cast .* attribute 'to'"), (add_constant, "/Constant: .* 'value'")],
)
def test_a_node_that_fixes_a_type_is_refused(add: Callable[[ir.Model], None], message: str):
    graph = retypable(ir.tensor(WEIGHT, name="w"))
    add(graph)
    with pytest.raises(TargetError, match=message):
        retype(graph, COMPUTE_DTYPES["bf16"])


# --- capacity -----------------------------------------------------------------------------------


def test_a_fixed_capacity_replaces_the_dimension_everywhere_and_no_other():
    graph = retypable(ir.tensor(WEIGHT, name="w"))
    fix_capacity(graph, 16)
    assert [str(v.shape) for v in graph.graph.inputs] == ["[batch,4]", "[batch,1,16,4]", "[batch]"]
    assert [str(v.shape) for v in graph.graph.outputs] == ["[batch,4]", "[batch,1,16,4]"]


@pytest.mark.parametrize("capacity", [0, -3, 17, True, 8.0, "8"])
def test_a_capacity_outside_the_rotary_table_is_refused(capacity):
    with pytest.raises(TargetError, match=f"capacity must be 1 to 16 tokens.* got {capacity!r}"):
        fix_capacity(retypable(ir.tensor(WEIGHT, name="w")), capacity)


def test_a_capacity_cannot_be_fixed_twice():
    graph = retypable(ir.tensor(WEIGHT, name="w"))
    fix_capacity(graph, 8)
    with pytest.raises(TargetError, match="must have a dynamic dimension 'capacity'"):
        fix_capacity(graph, 8)
