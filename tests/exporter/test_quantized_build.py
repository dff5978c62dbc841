"""`build --precision int8|int4`: what is written, and what is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exporter.quantized_layouts import Pack, compressed_bytes, gptq
from exporter.quantized_layouts import write_checkpoint as write_packed
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.checkpoint import open_checkpoint
from qwen_export.errors import ExportError, OptionError
from qwen_export.inspection import describe_text
from qwen_export.parity.original import BundleWeights
from qwen_export.quantization import QuantizationOptions, make_quantizer
from qwen_export.quantization.tensor import QuantizedTensor
from qwen_export.weights import BlockFormat, QuantizedSource, write_weights
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.manifest import QuantizedGroup

UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
UP = "model.layers.0.mlp.up_proj.weight"

BuildSmall = Callable[..., Bundle]


@pytest.fixture(scope="module")
def build_small(tmp_path_factory: pytest.TempPathFactory) -> BuildSmall:
    """Builds a small random checkpoint, once for the same options."""
    root = tmp_path_factory.mktemp("small")
    built: dict[str, Bundle] = {}

    def bundle_of(precision: str, *, tied: bool = True, **options: Any) -> Bundle:
        key = f"{precision}-{tied}-{sorted(options.items())}"
        if key not in built:
            folder = small_checkpoint(root / f"model-{tied}", tie_word_embeddings=tied)
            output = root / f"out-{len(built)}"
            built[key] = build(folder, output, BuildOptions(precision, verify=False, **options))
        return built[key]

    return bundle_of


def checkpoint_of(bundle: Bundle, *, tied: bool = True) -> Any:
    return open_checkpoint(bundle.path.parent / f"model-{tied}")


def graph_of(bundle: Bundle, phase: str = "prefill") -> onnx.ModelProto:
    return onnx.load(bundle.path / f"{phase}.onnx", load_external_data=False)


# --- the weights file ---------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(32, 3), (64, 7), (32, 8)])
def test_codes_and_scales_are_stored_as_onnx_reads_them(
    tmp_path: Path, bits: int, axis: int, shape: tuple[int, int], rng: np.random.Generator
) -> None:
    limit = 1 << (bits - 1)
    codes = rng.integers(-limit, limit, shape, dtype=np.int8)
    scales = rng.random((shape[0] // 32, shape[1]), dtype=np.float32)
    parts = [
        QuantizedTensor(codes[:, part], scales[:, part], bits, 32)
        for part in (slice(0, 2), slice(2, None))
    ]
    source = QuantizedSource("w", shape, BlockFormat(bits, 32, axis), lambda _: iter(parts), "rtn")
    file = write_weights(tmp_path / "weights.bin", [source], check=lambda *_: None)
    stored = {
        name: ir.ExternalTensor(
            file.path, tensor.offset, tensor.num_bytes, tensor.dtype,
            shape=ir.Shape(tensor.shape), name=name,
        ).numpy()
        for name, tensor in file.tensors.items()
    }  # fmt: skip
    expected = (codes, scales) if axis == 0 else (codes.T, scales.T)
    np.testing.assert_array_equal(stored["w"].astype(np.int8), expected[0])
    np.testing.assert_array_equal(stored["w_scale"], expected[1])
    assert sum(tensor.num_bytes for tensor in file.tensors.values()) == source.num_bytes


def test_two_int4_codes_share_a_byte_the_first_in_the_low_half(tmp_path: Path) -> None:
    codes = np.array([[1, -8, 7]], np.int8).repeat(16, axis=0)
    tensor = QuantizedTensor(codes, np.ones((1, 3), np.float32), 4, 16)
    source = QuantizedSource(
        "w", (16, 3), BlockFormat(4, 16, 0), lambda _: iter([tensor]), "imported"
    )
    file = write_weights(tmp_path / "weights.bin", [source], check=lambda *_: None)
    assert file.path.read_bytes()[:3] == bytes([0x81, 0x17, 0x78])


# --- bundles ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tied"), [("int4", True), ("int8", False)])
def test_every_weight_is_what_the_quantizer_made_of_it(
    build_small: BuildSmall, precision: str, tied: bool
) -> None:
    bundle = build_small(precision, tied=tied)
    checkpoint = checkpoint_of(bundle, tied=tied)
    found = BundleWeights(bundle, checkpoint)
    # Blocks of 64 where they divide the inputs, 32 for those of down_proj.
    linear = make_quantizer(QuantizationOptions(int(precision[3:]), 64, "search", or_smaller=True))
    table = make_quantizer(QuantizationOptions(8, 64, "search"))
    for name in checkpoint.tensors:
        weight = checkpoint.read(name)
        if weight.ndim == 2:
            quantizer = linear if name.startswith("model.layers.") else table
            weight = quantizer(np.ascontiguousarray(weight.T), name=name).dequantize().T
        np.testing.assert_array_equal(found.read(name), weight, err_msg=name)


@pytest.mark.parametrize(("precision", "tied"), [("int4", True), ("int8", False)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_onnxruntime_fuses_every_quantised_matmul_and_looks_up_codes(
    build_small: BuildSmall, tmp_path: Path, precision: str, tied: bool, phase: str
) -> None:
    bundle = build_small(precision, tied=tied)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(bundle.path / f"{phase}.onnx", options, ["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    counts = Counter(node.op_type for node in nodes)
    assert counts["MatMulNBits"] == 2 * 7 + 1
    assert counts["MatMul"] == counts["Gemm"] == 0
    # What is dequantised are the rows that were looked up, never a whole weight.
    looked_up = [node.input[0] for node in nodes if node.op_type == "DequantizeLinear"]
    assert set(looked_up) == {"/model/embed_tokens/Gather_output_0"}


def test_a_tied_table_is_stored_once_under_two_names(build_small: BuildSmall) -> None:
    bundle = build_small("int4")
    for phase in ("prefill", "decode"):
        places = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in graph_of(bundle, phase).graph.initializer
        }
        for suffix in ("", "_scale"):
            embedding = places[f"model.embed_tokens.weight{suffix}"]
            assert places[f"lm_head.weight{suffix}"] == embedding
    groups = bundle.manifest.quantization.groups if bundle.manifest.quantization else ()
    assert sum(group.num_bytes for group in groups) <= (bundle.path / "weights.bin").stat().st_size


def test_the_manifest_says_what_each_kind_of_weight_became(build_small: BuildSmall) -> None:
    bundle = build_small("int4", block_size=32, quantizer="rtn")
    entry = bundle.manifest.quantization
    assert entry is not None
    assert (entry.bits, entry.block_size, entry.method) == (4, 32, "rtn")
    assert entry.calibration_sha256 is None
    linears = 2 * (64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96)
    by_role = {group.role: group for group in entry.groups}
    assert by_role["linear"] == QuantizedGroup(
        "linear", "int4", 32, "rtn", 14, linears // 2 + linears // 32 * 4
    )
    assert by_role["tied table"] == QuantizedGroup(
        "tied table", "int8", 32, "rtn", 1, 101 * 64 + 101 * 2 * 4
    )
    assert by_role["float"].format == "fp32"
    text = describe_text(bundle)
    assert "linear      int4, block 32, rtn: 14 tensors" in text
    assert "tied table  int8, block 32, rtn: 1 tensor," in text


def test_exact_and_served_logits_are_close_and_not_the_same(build_small: BuildSmall) -> None:
    bundle = build_small("int8", tied=False)
    logits = []
    for exact in (True, False):
        runner = OnnxRuntimeRunner(bundle, exact=exact)
        runner.allocate(1, 16)
        logits += runner.prefill([0], [np.arange(16)], [0], [16])
        runner.close()
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
    assert 1e-4 < error < 0.1


def pack_gptq(plain: Path, folder: Path, bits: int, group: int) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}
    return write_packed(folder, gptq(bits, group), config, model=str(plain))


@pytest.mark.parametrize(
    ("bits", "group", "asked", "expected", "blocks"),
    [(4, 32, None, "int4", {32}), (4, -1, "int8", "int8", {64, 32})],
)
def test_the_codes_of_a_quantised_checkpoint_are_kept(
    tmp_path: Path, bits: int, group: int, asked: str | None, expected: str, blocks: set[int]
) -> None:
    plain = small_checkpoint(tmp_path / "plain")
    weights = pack_gptq(plain, tmp_path / "packed", bits, group)
    options = BuildOptions(asked, verify=False)
    bundle = build(tmp_path / "packed", tmp_path / "out", options)
    assert bundle.manifest.precision == expected
    found = BundleWeights(bundle, open_checkpoint(tmp_path / "packed"))
    assert len(weights) == 14
    for name, weight in weights.items():
        np.testing.assert_array_equal(found.read(name), weight, err_msg=name)
    entry = bundle.manifest.quantization
    assert entry is not None
    assert {(g.role, g.format, g.block_size, g.method) for g in entry.groups} == {
        *(("linear", expected, block, "imported") for block in blocks),
        ("tied table", "int8", 64, "search"),
        ("float", "fp32", None, None),
    }


def kinds(bundle: Bundle) -> set[tuple[str, str, int | None, str | None]]:
    entry = bundle.manifest.quantization
    assert entry is not None
    return {(group.role, group.format, group.block_size, group.method) for group in entry.groups}


FLOATS = ("float", "fp32", None, None)
TABLE = ("tied table", "int8", 64, "search")


def test_linear_layers_that_a_quantised_checkpoint_stores_plain_stay_fp32(tmp_path: Path) -> None:
    plain, packed = small_checkpoint(tmp_path / "plain"), tmp_path / "packed"
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    only = re.compile(r"model\.layers\.0\..*_proj\.weight")
    weights = write_packed(packed, gptq(4, 32), config, model=str(plain), which=only)
    bundle = build(packed, tmp_path / "native", BuildOptions(verify=False))
    imported = ("linear", "int4", 32, "imported")
    assert kinds(bundle) == {imported, ("linear", "fp32", None, None), TABLE, FLOATS}
    found, original = BundleWeights(bundle, open_checkpoint(packed)), open_checkpoint(plain)
    for name in original.tensors:
        if name.endswith("_proj.weight"):
            expected = weights[name] if name in weights else original.read(name)
            np.testing.assert_array_equal(found.read(name), expected, err_msg=name)
    bundle = build(packed, tmp_path / "all", BuildOptions("int4", verify=False))
    searched = {("linear", "int4", block, "search") for block in (32, 64)}
    assert kinds(bundle) == {imported, *searched, TABLE, FLOATS}


def pack_bytes(root: Path, low: int, high: int) -> dict[str, Any]:
    """int8 with zero points, a scale for each output."""
    scheme = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }
    plain = small_checkpoint(root / "plain")
    pack = compressed_bytes(None, sym=False, low=low, high=high)
    return write_packed(root / "packed", pack, config, model=str(plain))


@pytest.mark.parametrize("precision", [None, "int8"])
def test_asymmetric_bytes_that_fit_are_kept(tmp_path: Path, precision: str | None) -> None:
    weights = pack_bytes(tmp_path, -100, 100)
    options = BuildOptions(precision, verify=False)
    bundle = build(tmp_path / "packed", tmp_path / "out", options)
    imported = {("linear", "int8", block, "imported") for block in (32, 64)}
    assert kinds(bundle) == {*imported, TABLE, FLOATS}
    found = BundleWeights(bundle, open_checkpoint(tmp_path / "packed"))
    for name, weight in weights.items():
        np.testing.assert_array_equal(found.read(name), weight, err_msg=name)


def test_what_no_integers_hold_becomes_fp32_with_a_warning(tmp_path: Path) -> None:
    pack_bytes(tmp_path, -128, 127)
    with pytest.warns(
        UserWarning,
        match=r"hold \d+ of its 14 .* fp32, 4 bytes a weight; --precision int8 --quant",
    ):
        bundle = build(tmp_path / "packed", tmp_path / "out", BuildOptions(verify=False))
    assert bundle.manifest.precision == "fp32"
    # Asked for, it needs no words: warnings are errors here.
    build(tmp_path / "packed", tmp_path / "asked", BuildOptions("fp32", verify=False))


@pytest.mark.parametrize(
    ("pack", "bits", "precision", "lossless"),
    [
        (gptq(8, 32), 8, "int4", "int8"),
        (gptq(4, 32, sym=False), 4, "int4", "int8"),
        (gptq(8, 32, sym=False), 8, "int8", "fp32"),
    ],
)
def test_a_second_rounding_must_be_asked_for(
    tmp_path: Path, pack: Pack, bits: int, precision: str, lossless: str
) -> None:
    plain, packed = small_checkpoint(tmp_path / "plain"), tmp_path / "packed"
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False}
    config["sym"] = (bits, precision) == (8, "int4")
    write_packed(packed, pack, config, model=str(plain))
    with pytest.raises(
        OptionError,
        match=rf"{precision} would round 14 weights .* --precision {lossless} keeps every weight",
    ):
        build(packed, tmp_path / "out", BuildOptions(precision, verify=False))
    options = BuildOptions(precision, verify=False, quantizer="search")
    bundle = build(packed, tmp_path / "out", options)
    searched = {("linear", precision, block, "search") for block in (32, 64)}
    assert kinds(bundle) == {*searched, TABLE, FLOATS}


# --- tables of 4 bits ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """int4 with a tied table whose tokens share bytes two by two."""
    root = tmp_path_factory.mktemp("even")
    folder = small_checkpoint(root / "model-True", vocab_size=102)
    return build(folder, root / "out", BuildOptions("int4", verify=False))


def test_a_tied_table_of_4_bits_is_looked_up_as_its_own_bytes(even: Bundle) -> None:
    assert ("tied table", "int4", 64, "search") in kinds(even)
    for phase in ("prefill", "decode"):
        tensors = {tensor.name: tensor for tensor in graph_of(even, phase).graph.initializer}
        table, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
        assert table.external_data == head.external_data
        assert (table.data_type, list(table.dims)) == (onnx.TensorProto.UINT8, [64, 51])
        assert (head.data_type, list(head.dims)) == (onnx.TensorProto.INT4, [64, 102])
    sizes = sum(group.num_bytes for group in even.manifest.quantization.groups)  # type: ignore[union-attr]
    assert sizes <= (even.path / "weights.bin").stat().st_size


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_looking_up_packed_codes_gives_the_columns_of_the_table(even: Bundle, phase: str) -> None:
    graph = ir.load(even.path / f"{phase}.onnx")
    (states,) = (
        node.outputs[0]
        for node in graph.graph
        if node.op_type == "Transpose" and node.inputs[0].producer().op_type == "DequantizeLinear"
    )
    graph.graph.outputs.append(states)
    path = even.path / f"looked-up-{phase}.onnx"
    ir.save(graph, path)
    ids = np.arange(102).reshape(102, 1) if phase == "decode" else np.arange(102).reshape(2, 51)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {
        "input_ids": ids,
        "past_lengths": np.zeros(len(ids), np.int64),
        "logits_indices": np.zeros((len(ids), 1), np.int64),
    }
    cache = np.zeros((len(ids), 2, 64, 16), np.float32)
    feeds = {entry.name: given.get(entry.name, cache) for entry in session.get_inputs()}
    (found,) = session.run([states.name], feeds)
    expected = BundleWeights(even, checkpoint_of(even)).read("model.embed_tokens.weight")
    np.testing.assert_array_equal(found, expected[ids])
    head = BundleWeights(even, checkpoint_of(even)).read("lm_head.weight")
    np.testing.assert_array_equal(head, expected)


def test_onnxruntime_fuses_a_tied_projection_of_4_bits(even: Bundle, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(even.path / "prefill.onnx", options, ["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    counts = Counter(node.op_type for node in nodes)
    assert counts["MatMulNBits"] == 2 * 7 + 1
    assert counts["DequantizeLinear"] == 1


@pytest.mark.slow
def test_a_tied_table_of_4_bits_passes_parity(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model", vocab_size=102)
    bundle = build(folder, tmp_path / "out", BuildOptions("int4", block_size=32))
    assert bundle.manifest.parity.status == "passed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "keep", "role", "form"),
    [
        ({}, (), "tied table", "int8"),
        ({"vocab_size": 102}, ("lm_head.weight=int8",), "tied table", "int8"),
        ({"vocab_size": 102}, ("model.embed_tokens.*=int8",), "tied table", "int8"),
        ({"vocab_size": 102}, ("lm_head.*=int8", "lm_head.*=fp32"), "tied table", "fp32"),
        (UNTIED, (), "lm_head", "int4"),
        (UNTIED, (), "embedding", "int8"),
        (UNTIED, ("lm_head.weight=int8",), "lm_head", "int8"),
        (UNTIED, ("*.down_proj.*=int8",), "lm_head", "int4"),
    ],
)
def test_tables_take_the_precision_but_where_they_are_odd_or_kept(
    sizes: dict[str, Any], keep: tuple[str, ...], role: str, form: str, tmp_path: Path
) -> None:
    folder = small_checkpoint(tmp_path / "model", **sizes)
    options = BuildOptions("int4", verify=False, block_size=32, keep=keep)
    bundle = build(folder, tmp_path / "out", options)
    assert form in {kind[1] for kind in kinds(bundle) if kind[0] == role}
    linears = {kind[1] for kind in kinds(bundle) if kind[0] == "linear"}
    assert linears == ({"int4", "int8"} if "*.down_proj.*=int8" in keep else {"int4"})


def test_a_format_that_weights_are_not_kept_in_is_refused() -> None:
    with pytest.raises(OptionError, match=r"keeps weights in fp32 or int8, got lm_head=fp8"):
        BuildOptions("int4", keep=("lm_head=fp8",))


# --- weights to keep ----------------------------------------------------------------------------


def test_kept_weights_are_those_of_the_checkpoint(build_small: BuildSmall) -> None:
    bundle = build_small("int4", keep=("*.layers.1.mlp.*", "lm_head.weight"), tied=False)
    checkpoint = checkpoint_of(bundle, tied=False)
    found = BundleWeights(bundle, checkpoint)
    for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        np.testing.assert_array_equal(found.read(name), checkpoint.read(name), err_msg=name)
    assert not np.array_equal(found.read(UP), checkpoint.read(UP))
    entry = bundle.manifest.quantization
    assert entry is not None
    counts = {(group.role, group.format): group.num_tensors for group in entry.groups}
    assert counts["linear", "fp32"] == 3
    assert counts["lm_head", "fp32"] == counts["embedding", "int8"] == 1


@pytest.mark.slow
def test_a_tied_table_that_is_kept_passes_parity(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model")
    options = BuildOptions("int8", keep=("lm_head.weight",))
    bundle = build(folder, tmp_path / "out", options)
    assert bundle.manifest.parity.status == "passed"
    assert ("tied table", "fp32", None, None) in kinds(bundle)


def test_a_weight_that_no_block_divides_can_be_kept(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model", intermediate_size=80)
    with pytest.raises(ExportError, match=r"80 inputs, but none .* does; --keep model\.layers\.0"):
        build(folder, tmp_path / "out", BuildOptions("int4", verify=False))
    options = BuildOptions("int4", verify=False, keep=("*.down_proj.*",))
    bundle = build(folder, tmp_path / "out", options)
    assert kinds(bundle) == {
        ("linear", "int4", 64, "search"),
        ("linear", "fp32", None, None),
        TABLE,
        FLOATS,
    }


def test_calibration_of_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    plain = small_checkpoint(tmp_path / "plain")
    pack_gptq(plain, tmp_path / "packed", 4, 32)
    text = tmp_path / "text.txt"
    text.write_text("words")
    options = BuildOptions(quantizer="gptq", calibration=text)
    with pytest.raises(ExportError, match="is quantised already; leave it out"):
        build(tmp_path / "packed", tmp_path / "out", options)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int2"}, "--precision must be one of fp32, int8, int4, got 'int2'"),
        ({"precision": "int8", "block_size": 48}, "--block-size must be one of 32, 64, 128"),
        ({"precision": "int8", "block_size": 32.0}, "--block-size must be one of 32, 64, 128"),
        ({"precision": "int4", "quantizer": "hqq"}, "--quantizer must be one of rtn, search"),
        ({"precision": "int4", "quantizer": "gptq"}, "must be given together"),
        ({"precision": "int4", "calibration": Path("text")}, "must be given together"),
        ({"precision": "fp32", "block_size": 64}, "but the precision is fp32"),
        ({"precision": "fp32", "keep": ("*",)}, "but the precision is fp32"),
        ({"precision": "int8", "keep": "lm_head.weight"}, "--keep must be patterns of names"),
        ({"precision": "int8", "keep": ("",)}, "--keep must be patterns of names"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        BuildOptions(**options)


@pytest.mark.parametrize("options", [{"quantizer": "rtn"}, {"block_size": 32}])
def test_options_that_no_weight_uses_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = small_checkpoint(tmp_path / "plain")
    pack_gptq(plain, tmp_path / "packed", 4, 32)
    keep = ("model.embed_tokens.*",)
    with pytest.raises(OptionError, match="has no weight to quantise"):
        build(tmp_path / "packed", tmp_path / "out", BuildOptions(keep=keep, **options))
    bundle = build(tmp_path / "packed", tmp_path / "out", BuildOptions(keep=keep, verify=False))
    assert ("tied table", "fp32", None, None) in kinds(bundle)


@pytest.mark.parametrize("pattern", ["*.norm.weight", "model.layers.9.*", "LM_HEAD.weight"])
def test_a_pattern_that_keeps_nothing_is_refused(tmp_path: Path, pattern: str) -> None:
    folder = small_checkpoint(tmp_path / "model")
    with pytest.raises(OptionError, match="matches none of the 15 weights that can be quantised"):
        build(folder, tmp_path / "out", BuildOptions("int8", keep=(pattern,)))


def test_quantisation_options_are_refused_where_nothing_is_quantised(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model")
    with pytest.raises(ExportError, match="but the precision is fp32"):
        build(folder, tmp_path / "out", BuildOptions(block_size=64))


def test_a_block_size_that_does_not_divide_is_refused_before_anything_is_traced(
    tmp_path: Path,
) -> None:
    folder = small_checkpoint(tmp_path / "model")
    with pytest.raises(ExportError, match=r"down_proj\.weight: a block size of 64 must divide"):
        build(folder, tmp_path / "out", BuildOptions("int8", block_size=64))
    assert not (tmp_path / "out").exists()
