"""The graph for the CPU: what it is made of, and that it answers like the portable one."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exporter.lowered_sessions import operators, read_initializer
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.errors import TargetError
from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_export.lowering.inspect import inspect_lowered
from qwen_export.lowering.options import CPU_OPTIONS
from qwen_runtime.backends.lowered_contents import pieces
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_file import LoweredFolder

QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
UNTIED = {"tie_word_embeddings": False}
WIDE = {"hidden_size": 128, "intermediate_size": 256}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int8": ({"precision": "int8", "block_size": 32}, {}),
    "int8 untied in blocks of 64": ({"precision": "int8", "block_size": 64}, WIDE | UNTIED),
    "int8 in blocks of 128": ({"precision": "int8", "block_size": 128}, WIDE),
    "int8 sliding": ({"precision": "int8", "block_size": 32}, SLIDING),
    "int4 with an int8 table": ({"precision": "int4", "block_size": 32}, {}),
    "int4 with an int4 table": ({"precision": "int4", "block_size": 32}, {"vocab_size": 102}),
    "int4 untied": ({"precision": "int4", "block_size": 32}, UNTIED),
    "int4 in blocks of 128": ({"precision": "int4", "block_size": 128}, WIDE),
    "int4 in blocks of each size": ({"precision": "int4"}, {"intermediate_size": 128}),
    "int4 qwen3": ({"precision": "int4", "block_size": 32}, QWEN3),
    "int8 qwen3 untied": ({"precision": "int8", "block_size": 32}, QWEN3 | UNTIED),
    "int4 with an int8 head": (
        {"precision": "int4", "block_size": 32, "keep": ("lm_head.weight=int8",)},
        {"vocab_size": 102},
    ),
    "int4 with floats": ({"precision": "int4", "block_size": 32, "keep": ("*k_proj*",)}, {}),
    "int4 with a table of floats": (
        {"precision": "int4", "block_size": 32, "keep": ("*embed_tokens*",)},
        {},
    ),
    "one key head": ({"precision": "int8", "block_size": 32}, {"num_key_value_heads": 1}),
    "heads of 8": ({"precision": "int8", "block_size": 32}, {"num_attention_heads": 8}),
}
TOLERANCE = 1e-5

SmallBundle = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> SmallBundle:
    """Builds each of `MODELS` once, with its graph for the CPU."""

    @functools.cache
    def make(name: str) -> Bundle:
        options, config = MODELS[name]
        folder = tmp_path_factory.mktemp("small")
        checkpoint = small_checkpoint(folder / "model", **config)
        return build(checkpoint, folder / "out", BuildOptions(verify=False, **options))

    return make


def answers(bundle: Bundle, *, lowered: bool) -> list[np.ndarray]:
    """Logits, with fp32 activations, of every kind of call that a runner makes."""
    rng = np.random.default_rng(5)
    vocab_size = bundle.manifest.model.vocab_size
    rows = [rng.integers(0, vocab_size, length) for length in (20, 20, 7, 1)]
    runner = OnnxRuntimeRunner(bundle, threads=1, exact=True, lowered=lowered)
    with closing(runner):
        assert ("total_sequence_length" in inputs_of(runner)) == lowered
        runner.allocate(5, 32)
        # Two rows of a length share a call, the others run alone.
        found = [*runner.prefill(range(4), rows, [0] * 4, [len(row) for row in rows])]
        more = [rng.integers(0, vocab_size, 6) for _ in range(2)]
        found += runner.prefill([0, 1], more, [20, 20], [6, 2])
        for _ in range(4):
            found.append(runner.decode([0, 1, 2, 3], [*rng.integers(0, vocab_size, 4)]).copy())
        runner.copy(0, 4, 12)
        found += runner.prefill([4], more[:1], [12], [6])
        return found


def inputs_of(runner: OnnxRuntimeRunner) -> list[str]:
    return [entry.name for entry in runner._prefill.get_inputs()]


def largest_error(bundle: Bundle) -> float:
    """max|difference| / max|logit| over all positions."""
    pairs = zip(answers(bundle, lowered=True), answers(bundle, lowered=False), strict=True)
    return max(
        float((np.abs(ours - theirs).max(-1) / np.abs(theirs).max(-1)).max())
        for ours, theirs in pairs
    )


def changed(bundle: Bundle, folder: Path, change: Callable[[ir.Node], None]) -> Bundle:
    """A copy whose attention nodes are others; sizes are listed again, for they are checked."""
    copy = Bundle.open(shutil.copytree(bundle.path, folder))
    path = copy.path / "lowered" / "cpu" / "prefill.onnx"
    before = path.stat().st_size
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            change(node)
    ir.save(model, path)
    document = path.with_name("lowered.json")
    text = document.read_text()
    document.write_text(text.replace(f": {before}\n", f": {path.stat().st_size}\n"))
    return copy


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("int8", "int4 qwen3") else pytest.param(name, marks=pytest.mark.slow)
        for name in MODELS
    ],
)
def test_every_model_and_format_answers_alike_in_fp32(
    name: str, small_bundle: SmallBundle
) -> None:
    assert largest_error(small_bundle(name)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("int8 sliding", "local_window_size", -1),
        ("int8 sliding", "local_window_size", 7),
        ("int8", "rotary_interleaved", 1),
        ("int8", "scale", 0.3),
    ],
)
def test_another_attention_would_show(
    name: str, attribute: str, value: float, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    def change(node: ir.Node) -> None:
        make = ir.AttrInt64 if isinstance(value, int) else ir.AttrFloat32
        node.attributes.add(make(attribute, value))

    assert largest_error(changed(small_bundle(name), tmp_path / "copy", change)) > 0.001


def test_one_graph_of_fused_operators_serves_both_phases(small_bundle: SmallBundle) -> None:
    bundle = small_bundle("int8")
    folder = LoweredFolder.open(bundle, "cpu")
    description = folder.description
    assert (description.target, description.compute_dtype) == ("cpu", "fp32")
    assert (description.attention, description.options) == ("group_query", ("--target", "cpu"))
    assert list(description.graphs) == ["prefill"]
    assert sorted(path.name for path in folder.path.iterdir()) == ["lowered.json", "prefill.onnx"]
    found = operators(folder.graph_file("prefill"))
    assert found["GroupQueryAttention"] == 2
    # Queries, keys and values in one product; o, gate, up, down; and the head.
    assert found["MatMulNBits"] == 2 * 5 + 1
    # The first norm has no sum in front of it, the last one reads the wanted positions only.
    assert found["SkipSimplifiedLayerNormalization"] == 3
    assert found["SimplifiedLayerNormalization"] == 2
    assert found["QuickGelu"] == 2
    strangers = {"DequantizeLinear", "MatMul", "Shape", "Range", "Split", "TensorScatter"}
    assert not strangers & set(found)
    inputs = [entry.name for entry in description.graphs["prefill"].inputs]
    portable = [entry.name for entry in bundle.manifest.graphs["prefill"].inputs]
    assert [name for name in inputs if name != "total_sequence_length"] == portable


def test_products_round_activations_and_attention_has_its_models_numbers(
    small_bundle: SmallBundle,
) -> None:
    for name, window, rotates in (("int8", -1, 1), ("heads of 8", -1, 0)):
        bundle = small_bundle(name)
        model, nodes = bundle.manifest.model, graph_of(bundle)
        for node in nodes:
            if node.op_type == "MatMulNBits":
                assert node.attributes.get_int("accuracy_level", 0) == 4
            if node.op_type == "GroupQueryAttention":
                names = ("num_heads", "kv_num_heads", "local_window_size", "do_rotary")
                assert [node.attributes.get_int(each, None) for each in names] == [
                    *(model.num_attention_heads, model.num_key_value_heads, window, rotates)
                ]
        kinds = {node.op_type for node in nodes}
        assert ("RotaryEmbedding" in kinds) == (not rotates)


@pytest.mark.slow
def test_a_window_is_that_of_its_layer(small_bundle: SmallBundle) -> None:
    windows = [
        node.attributes.get_int("local_window_size", None)
        for node in graph_of(small_bundle("int8 sliding"))
        if node.op_type == "GroupQueryAttention"
    ]
    assert windows == [-1, 6]


def graph_of(bundle: Bundle) -> list[ir.Node]:
    return list(ir.load(LoweredFolder.open(bundle, "cpu").graph_file("prefill")).graph)


def test_weights_lie_past_the_files_end_and_are_made_as_described(
    small_bundle: SmallBundle,
) -> None:
    bundle = small_bundle("int4 qwen3")
    folder = LoweredFolder.open(bundle, "cpu")
    weights = bundle.file("weights.bin")
    tensors = ir.load(folder.graph_file("prefill")).graph.initializers
    entries = {entry.name: entry for entry in folder.description.initializers}
    external = {
        name: value.const_value
        for name, value in tensors.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    assert set(external) == set(entries)
    for name, tensor in external.items():
        assert tensor.offset == weights.stat().st_size, name
        made = b"".join(piece.tobytes() for piece in pieces(entries[name], weights))
        assert made == read_initializer(bundle, entries[name]).tobytes(), name
        assert len(made) == tensor.nbytes


def test_floats_and_what_the_operator_does_not_take_are_refused(
    golden_bundle: Callable[[str], Path], small_bundle: SmallBundle, tmp_path: Path
) -> None:
    floats = Bundle.open(shutil.copytree(golden_bundle("qwen2_untied"), tmp_path / "floats"))
    with pytest.raises(
        TargetError, match=r"floats must have int8 or int4 weights to be lowered for cpu, got fp32"
    ):
        lower_bundle(floats, "cpu")
    assert not (floats.path / "lowered").exists()
    copy = Bundle.open(shutil.copytree(small_bundle("int8").path, tmp_path / "copy"))
    for options in (LoweringOptions("bf16"), LoweringOptions("fp32", "mask")):
        with pytest.raises(TargetError, match="graphs for cpu must compute in fp32 with group_q"):
            lower_bundle(copy, "cpu", options, overwrite=True)
    with pytest.raises(TargetError, match="target must be cpu or cuda to be lowered to, got npu"):
        lower_bundle(copy, "npu")


def test_a_graph_with_a_node_that_is_not_known_is_found(small_bundle: SmallBundle) -> None:
    graph = ir.load(LoweredFolder.open(small_bundle("int8"), "cpu").graph_file("prefill")).graph
    graph.append(ir.node("Shape", [graph.inputs[0]], name="/stray/Shape"))
    with pytest.raises(
        TargetError, match=r"graph for cpu must be .* /stray/Shape is ai\.onnx::Sh"
    ):
        inspect_lowered(graph, CPU_OPTIONS, "cpu", num_hidden_layers=2)
