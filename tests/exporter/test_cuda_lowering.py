"""Lowered graphs against the portable ones, on ONNX Runtime's CPU provider."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exporter.lowered_sessions import (
    NEVER_WRITTEN,
    Lowered,
    Portable,
    operators,
    read_initializer,
)
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_file import LoweredFolder

GOLDEN = (
    *("qwen2_untied", "qwen2_tied", "qwen2_draft", "qwen2_sliding", "qwen2_layer_types"),
    *("qwen2_yarn_full", "qwen2_linear", "qwen2_llama3", "qwen3_untied", "qwen3_tied_bias"),
)
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
SMALL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp32": ({}, {}),
    "one key head": ({}, {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "int8": ({"precision": "int8", "block_size": 32}, {}),
    "int8 untied": ({"precision": "int8", "block_size": 32}, {"tie_word_embeddings": False}),
    "int4": ({"precision": "int4", "block_size": 32}, {}),
    "int4 even": ({"precision": "int4", "block_size": 32}, {"vocab_size": 102}),
    "int4 qwen3": ({"precision": "int4", "block_size": 32}, QWEN3),
    "k_proj kept": ({"precision": "int4", "block_size": 32, "keep": ("*k_proj*",)}, {}),
}
FP32_TOLERANCE = 1e-5
FP16_TOLERANCE = 0.0125

LowerGolden = Callable[[str, LoweringOptions], tuple[Bundle, LoweredFolder]]


def lowered_copy(
    source: Path, folder: Path, options: LoweringOptions
) -> tuple[Bundle, LoweredFolder]:
    bundle = Bundle.open(shutil.copytree(source, folder))
    return bundle, lower_bundle(bundle, "cuda", options)


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds each of `SMALL` once: tracing is most of what a test here takes."""

    @functools.cache
    def make(name: str) -> Path:
        options, config = SMALL[name]
        folder = tmp_path_factory.mktemp("small")
        checkpoint = small_checkpoint(folder / "model", **config)
        return build(checkpoint, folder / "portable", BuildOptions(verify=False, **options)).path

    return make


def largest_error(bundle: Bundle, portable: Portable, lowered: Lowered) -> float:
    """Prompts together, a second chunk of one, then ragged steps; max|difference| / max|logit|."""
    rng = np.random.default_rng(5)
    vocab_size = bundle.manifest.model.vocab_size
    calls: list[tuple[str, np.ndarray, np.ndarray, slice]] = [
        ("prefill", rng.integers(0, vocab_size, (2, 20)), np.zeros(2, np.int64), slice(None)),
        ("prefill", rng.integers(0, vocab_size, (1, 6)), np.array([20]), slice(0, 1)),
    ]
    past = np.array([26, 20])
    for _ in range(4):
        calls.append(("decode", rng.integers(0, vocab_size, (2, 1)), past, slice(None)))
        past = past + 1
    errors = []
    for phase, ids, lengths, rows in calls:
        expected = portable.run(phase, ids, lengths, rows)["logits"]
        found = lowered.run(phase, ids, lengths, rows)
        difference = np.abs(found["logits"] - expected).max(-1)
        errors.append(float((difference / np.abs(expected).max(-1)).max()))
        if phase == "decode":
            greedy = found["logits"][:, 0].argmax(-1)
            np.testing.assert_array_equal(found["next_tokens"], greedy)
    for name, cache in lowered.caches.items():
        for row, length in enumerate(past):
            assert (cache[row, :, length:] == NEVER_WRITTEN).all(), f"{name} row {row}"
    return max(errors)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["group_query", "mask"])
@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_model_answers_alike_from_its_lowered_graphs(
    name: str, attention: Any, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    options = LoweringOptions("fp32", attention)
    bundle, folder = lowered_copy(golden_bundle(name), tmp_path / "bundle", options)
    error = largest_error(bundle, Portable(bundle), Lowered(bundle, folder))
    assert error <= FP32_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_format_of_weights_answers_alike_in_fp32_and_fp16(
    name: str, small_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    source = small_bundle(name)
    forms = (
        (LoweringOptions("fp32", "group_query"), FP32_TOLERANCE),
        (LoweringOptions("fp32"), FP32_TOLERANCE),
        (LoweringOptions("fp16"), FP16_TOLERANCE),
    )
    for number, (options, tolerance) in enumerate(forms):
        bundle, folder = lowered_copy(source, tmp_path / str(number), options)
        error = largest_error(bundle, Portable(bundle), Lowered(bundle, folder))
        assert error <= tolerance, options


def test_a_window_that_is_lost_would_show(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    options = LoweringOptions("fp32", "group_query")
    bundle, folder = lowered_copy(golden_bundle("qwen2_sliding"), tmp_path / "bundle", options)
    for phase in ("prefill", "decode"):
        path = folder.graph_file(phase)
        model = ir.load(path)
        for node in model.graph:
            if node.op_type == "GroupQueryAttention":
                node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", -1)
        ir.save(model, path)
    assert largest_error(bundle, Portable(bundle), Lowered(bundle, folder)) > 0.01


@pytest.mark.slow
def test_queries_keys_and_values_are_one_product_where_nothing_stands_between(
    small_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, packed in (("int4", True), ("int4 qwen3", False), ("k_proj kept", False)):
        source = small_bundle(name)
        _, folder = lowered_copy(source, tmp_path / name / "copy", LoweringOptions("bf16"))
        names = {entry.name for entry in folder.description.initializers}
        assert ("model.layers.0.self_attn.qkv_proj.weight" in names) == packed, name
        found = operators(folder.graph_file("decode"))
        assert found["GroupQueryAttention"] == 2
        # The norms of queries and keys, and the first of all.
        alone = 5 if name == "int4 qwen3" else 1
        assert found["SimplifiedLayerNormalization"] == alone
        assert found["SkipSimplifiedLayerNormalization"] == 4
        assert found["QuickGelu"] == 2
        assert not {"Split", "Shape", "Range", "DequantizeLinear"} & set(found)


def test_equal_logits_give_the_lowest_token_and_nan_no_token(
    small_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    source = small_bundle("one key head")
    options = LoweringOptions("fp32", "group_query")
    bundle, folder = lowered_copy(source, tmp_path / "bundle", options)
    entry = next(e for e in folder.description.initializers if e.name == "lm_head.weight")
    head = read_initializer(bundle, entry)
    ids, past = np.array([[5], [9]]), np.array([0, 3])
    for columns, tokens in ((0.0, [0, 0]), (np.nan, [head.shape[1]] * 2)):
        given = {entry.name: np.full_like(head, columns)}
        found = Lowered(bundle, folder, given).run("decode", ids, past)
        np.testing.assert_array_equal(found["next_tokens"], tokens)


def test_residual_stream_and_norms_stay_float32_in_fp16(
    small_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    source = small_bundle("fp32")
    _, folder = lowered_copy(source, tmp_path / "bundle", LoweringOptions("fp16"))
    graph = ir.load(folder.graph_file("decode")).graph
    for node in graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            assert {v.dtype for v in (*node.inputs[:3], node.outputs[0])} == {ir.DataType.FLOAT}
        if node.op_type in ("MatMul", "GroupQueryAttention"):
            assert node.outputs[0].dtype == ir.DataType.FLOAT16
    kinds = {entry.name: entry.dtype for entry in folder.description.initializers}
    assert kinds["model.layers.0.input_layernorm.weight"] == "float"
    assert kinds["model.layers.0.self_attn.qkv_proj.weight"] == "float16"


def test_a_bf16_graph_has_no_cast_between_layers(
    small_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    source = small_bundle("fp32")
    _, folder = lowered_copy(source, tmp_path / "bundle", LoweringOptions())
    graph = ir.load(folder.graph_file("decode")).graph
    casts = [node.name for node in graph if node.op_type == "Cast"]
    assert casts == ["/model/Cast_seqlens", "/lm_head/Cast", "/next_tokens/Cast"]
    caches = [v for v in graph.inputs if str(v.name).startswith("past_key_values.")]
    assert {value.dtype for value in caches} == {ir.DataType.BFLOAT16}
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.dtype == ir.DataType.FLOAT
