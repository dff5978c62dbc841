"""A bundle's graph on its way into an engine: retyped, of fixed capacity, with its profiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file, save_file
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.errors import TargetError
from qwen_export.passes.retype import retype
from qwen_export.targets.profiles import Profile, SizeRange, check_profiles, profile_shapes
from qwen_export.targets.ranges import check_float16_range
from qwen_export.targets.tensorrt import engine_graph
from qwen_runtime.backends.base import FloatArray
from qwen_runtime.bundle import Bundle

LAYERS = 8
CAPACITY = 256
PREFILL = Profile.prefill(SizeRange(1, 1, 8), SizeRange(1, 64, 128), SizeRange(1, 1, 8))


def graph(bundle: Bundle, phase: str, dtype: str = "bf16") -> ir.Model:
    return engine_graph(bundle, phase, dtype=dtype, capacity=CAPACITY)


@pytest.mark.parametrize("profiles", [[], [PREFILL, PREFILL]])
def test_profiles_need_names_of_their_own(tiny_bundle, profiles):
    with pytest.raises(TargetError, match="at least one profile, each with its own name"):
        check_profiles(profiles, graph(tiny_bundle, "prefill").graph)


def test_profiles_need_a_fixed_capacity(tiny_bundle):
    dynamic = ir.load(tiny_bundle.path / "prefill.onnx")
    with pytest.raises(TargetError, match=r"same fixed capacity .* got capacity"):
        check_profiles([PREFILL], dynamic.graph)


@pytest.mark.parametrize("sizes", [(0, 1, 2), (2, 1, 3), (1, 3, 2), (1, 1, True), (1, 1, 2.0)])
def test_a_size_range_must_be_ordered_whole_numbers(sizes):
    with pytest.raises(TargetError, match="1 <= min <= opt <= max"):
        SizeRange(*sizes)


def test_a_profile_gives_inputs_that_share_a_dimension_the_same_size(tiny_bundle):
    shapes = profile_shapes(PREFILL, list(graph(tiny_bundle, "prefill").graph.inputs))
    assert shapes["input_ids"] == ((1, 1), (1, 64), (8, 128))
    assert shapes["logits_indices"] == ((1, 1), (1, 1), (8, 8))
    assert shapes["past_lengths"] == ((1,), (1,), (8,))
    cache = tuple((batch, 2, CAPACITY, 32) for batch in (1, 1, 8))
    assert shapes["past_key_values.7.value"] == cache
    assert len(shapes) == 3 + 2 * LAYERS


@pytest.mark.parametrize("dtype", ["fp32", "int8", "float16"])
def test_an_engine_type_that_is_not_offered_is_refused(tiny_bundle, dtype):
    with pytest.raises(TargetError, match=f"computes in bf16 or fp16, got {dtype}"):
        engine_graph(tiny_bundle, "decode", dtype=dtype, capacity=CAPACITY)


@pytest.mark.parametrize("capacity", [0, -1, 2049, True, 256.0])
def test_a_capacity_beyond_the_rotary_tables_is_refused(tiny_bundle, capacity):
    with pytest.raises(TargetError, match="capacity must be 1 to 2048 tokens"):
        engine_graph(tiny_bundle, "decode", dtype="bf16", capacity=capacity)


def test_a_retyped_graph_has_one_float_type_and_float32_logits(tiny_bundle):
    model = graph(tiny_bundle, "prefill", "bf16")
    values: list[Any] = [*model.graph.inputs, *model.graph.outputs]
    values += [*model.graph.initializers.values(), *(o for n in model.graph for o in n.outputs)]
    floats = {value.name for value in values if value.dtype == ir.DataType.FLOAT}
    assert floats == {"logits"}
    assert model.graph.outputs[0].name == "logits"
    producer = model.graph.outputs[0].producer()
    assert producer is not None
    assert producer.name == "/lm_head/Cast"
    dims = {dim.value for value in values for dim in value.shape if not isinstance(dim, int)}
    assert {"batch", "sequence", "num_logits"} <= dims
    assert "capacity" not in dims


def test_a_graph_retyped_to_fp16_keeps_its_residual_stream_in_float32(tiny_bundle):
    model = graph(tiny_bundle, "prefill", "fp16")
    nodes = {node.name: node for node in model.graph}
    exact = {
        name
        for name, node in nodes.items()
        if node.outputs[0].dtype == ir.DataType.FLOAT and node.op_type != "Cast"
    }
    residual = {f"/model/layers.{i}/{add}" for i in range(LAYERS) for add in ("Add", "Add_1")}
    norms = {
        f"/model/layers.{i}/{norm}_layernorm/RMSNormalization"
        for i in range(LAYERS)
        for norm in ("input", "post_attention")
    }
    assert exact == {*residual, *norms, "/GatherND", "/model/norm/RMSNormalization"}
    for name in exact:
        operands = [value for value in nodes[name].inputs if value.dtype != ir.DataType.INT64]
        assert {value.dtype for value in operands} == {ir.DataType.FLOAT}, name
    halves = [
        node for node in model.graph if node.op_type in ("MatMul", "Gemm", "RotaryEmbedding")
    ]
    assert {value.dtype for node in halves for value in node.inputs} == {
        ir.DataType.FLOAT16,
        ir.DataType.INT64,
    }


def test_a_graph_whose_residual_stream_is_not_recognised_is_refused(tiny_bundle):
    model = ir.load(tiny_bundle.path / "prefill.onnx")
    (add,) = (node for node in model.graph if node.name == "/model/layers.3/Add")
    add.name = "/model/layers.3/Plus"
    with pytest.raises(TargetError, match=r"16 additions to its residual .* found 15 and 17"):
        retype(model, ir.DataType.FLOAT16)
    retype(model, ir.DataType.BFLOAT16)


def half_logits(bundle: Bundle, model: ir.Model, feeds: dict[str, Any]) -> FloatArray:
    """What a graph in fp16 answers on the CPU; its float32 weights are the bundle's."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(bundle.path))
    # Optimisation would take the Casts that matter here for superfluous.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return run(session, feeds, np.float16)


def run(session: Any, feeds: dict[str, Any], dtype: type) -> FloatArray:
    batch = len(feeds["input_ids"])
    caches = {
        value.name: np.zeros((batch, *(size if isinstance(size, int) else 64 for size in
                              value.shape[1:])), dtype)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }  # fmt: skip
    logits: FloatArray = session.run(["logits"], feeds | caches)[0]
    assert logits.dtype == np.float32
    return logits


def exact_logits(bundle: Bundle, feeds: dict[str, Any]) -> FloatArray:
    session = ort.InferenceSession(
        bundle.path / "prefill.onnx", providers=["CPUExecutionProvider"]
    )
    return run(session, feeds, np.float32)


def some_feeds(vocab_size: int, rng: np.random.Generator) -> dict[str, Any]:
    return {
        "input_ids": rng.integers(0, vocab_size, (2, 9)),
        "past_lengths": np.zeros(2, np.int64),
        "logits_indices": np.array([[8], [4]]),
    }


def test_a_graph_retyped_to_fp16_answers_like_the_fp32_graph(tiny_bundle, rng):
    feeds = some_feeds(4096, rng)
    exact = exact_logits(tiny_bundle, feeds)
    half = half_logits(tiny_bundle, graph(tiny_bundle, "prefill", "fp16"), feeds)
    # fp16 has 11 bits: 5e-4 per rounding, growing with the square root of 8 layers' additions.
    assert 1e-6 < np.abs(half - exact).max() / np.abs(exact).max() < 1e-2


@pytest.fixture(scope="module")
def loud_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Bundle]:
    """Builds a model whose residual stream is 65,000 in one channel, give or take a layer."""
    root = tmp_path_factory.mktemp("loud")

    @cache
    def bundle(gain: float) -> Bundle:
        folder = small_checkpoint(root / f"model-{gain}", tie_word_embeddings=False)
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][:, 0] = 65_000
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            weights[f"model.layers.0.{name}.weight"][0] *= gain
        save_file(weights, folder / "model.safetensors")
        return build(folder, root / f"bundle-{gain}", BuildOptions(verify=False))

    return bundle


def test_a_residual_stream_beyond_float16_does_not_overflow(loud_bundle, monkeypatch, rng):
    bundle = loud_bundle(3000)
    feeds = some_feeds(101, rng)
    exact = exact_logits(bundle, feeds)
    model = engine_graph(bundle, "prefill", dtype="fp16", capacity=64)
    half = half_logits(bundle, model, feeds)
    assert np.abs(half - exact).max() / np.abs(exact).max() < 1e-2
    # Were the stream float16 as well, it would.
    monkeypatch.setattr("qwen_export.passes.retype.residual_nodes", lambda graph: ())
    model = engine_graph(bundle, "prefill", dtype="fp16", capacity=64)
    assert not np.isfinite(half_logits(bundle, model, feeds)).all()


def test_the_range_of_linear_layers_is_measured(tiny_bundle, loud_bundle):
    found = check_float16_range(tiny_bundle)
    assert found.node == "/model/layers.7/mlp/down_proj/MatMul"
    assert 100 < found.largest < 1000
    assert found.tokens > 500
    # The residual stream of this one is beyond float16, which does not matter.
    assert check_float16_range(loud_bundle(3000)).largest < 5000


def test_a_linear_layer_near_float16s_end_is_named(loud_bundle):
    with pytest.raises(
        TargetError, match=r"needs values within ±32,752, .*/model/layers\.0/self_attn/o_proj"
    ) as caught:
        check_float16_range(loud_bundle(60_000))
    assert caught.value.names[0] == "/model/layers.0/self_attn/o_proj/MatMul"
