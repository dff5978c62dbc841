"""A bundle's graph on its way into an engine: retyped, of fixed capacity, with its profiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qwen_export.errors import TargetError
from qwen_export.targets.profiles import Profile, SizeRange, check_profiles, profile_shapes
from qwen_export.targets.tensorrt import engine_graph
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


def test_a_graph_retyped_to_fp16_answers_like_the_fp32_graph(tiny_bundle, tmp_path):
    ir.save(graph(tiny_bundle, "prefill", "fp16"), tmp_path / "fp16.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    rng = np.random.default_rng(0)
    feeds = {
        "input_ids": rng.integers(0, 4096, (2, 9)),
        "past_lengths": np.zeros(2, np.int64),
        "logits_indices": np.array([[8], [4]]),
    }
    logits = []
    for path, dtype in ((tiny_bundle.path / "prefill.onnx", np.float32), ("fp16", np.float16)):
        session = ort.InferenceSession(
            tmp_path / "fp16.onnx" if path == "fp16" else path,
            options,
            providers=["CPUExecutionProvider"],
        )
        cache = {
            value.name: np.zeros((2, 2, CAPACITY, 32), dtype)
            for value in session.get_inputs()
            if value.name.startswith("past_key_values")
        }
        logits.append(session.run(["logits"], feeds | cache)[0])
    exact, half = logits
    assert half.dtype == np.float32
    # fp16 has 11 bits: 5e-4 per rounding, growing with the square root of 8 layers' additions.
    assert 1e-6 < np.abs(half - exact).max() / np.abs(exact).max() < 1e-2
