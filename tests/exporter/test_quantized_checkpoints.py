from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from exporter.quantized_layouts import (
    LINEAR,
    Pack,
    awq,
    change_tensors,
    compressed_bytes,
    compressed_packed,
    float8,
    gptq,
    write_checkpoint,
)
from safetensors.numpy import save_file

from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.checkpoint.config_values import ConfigValues
from qwen_export.checkpoint.quantized import IntegerWeight, StoredTensors
from qwen_export.checkpoint.quantized.compressed import CompressedMethod
from qwen_export.checkpoint.safetensors_file import SafetensorsFile
from qwen_export.formats import native_precision

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
EVERY = re.compile(r".*_proj\.weight|lm_head\.weight")


def gptq_config(bits: int, group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, **more}


def awq_config(group: int, **more: Any) -> dict[str, Any]:
    common = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
    return {**common, "group_size": group, **more}


def compressed_config(storage: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": storage,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        **more,
    }


def fp8_config(**more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **more}


def integers(bits: int, strategy: str, group: int | None = None, **more: Any) -> dict[str, Any]:
    common = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group}
    return {**common, "symmetric": True, **more}


def floats(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}


def check(
    checkpoint: Checkpoint, expected: dict[str, Any], exact_bits: int | None, block: int | None
) -> None:
    """Every packed weight reads as the loops read it, and its codes give the same numbers."""
    assert checkpoint.quantized.keys() == expected.keys()
    for name, weight in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, weight, err_msg=name)
        assert checkpoint.tensors[name].shape == weight.shape
        codes = checkpoint.read_quantized(name)
        if exact_bits is None:
            assert codes is None
            check_rows(checkpoint, {name: weight})
            continue
        assert codes is not None
        assert (codes.bits, codes.block_size) == (exact_bits, block or weight.shape[1])
        assert codes.codes.shape == weight.T.shape
        limit = 1 << (exact_bits - 1)
        assert codes.codes.min() >= -limit
        assert codes.codes.max() < limit
        np.testing.assert_array_equal(codes.dequantize(), weight.T, err_msg=name)
        checkpoint.release(name)
    check_rows(checkpoint, expected)
    assert checkpoint.read_quantized("model.norm.weight") is None
    precision = f"int{exact_bits}" if exact_bits else "fp32"
    assert native_precision(checkpoint.exact_bits().values()) == precision


def check_rows(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """Rows are those of the whole weight, wherever they begin and in whatever order."""
    for name, weight in expected.items():
        last = len(weight) - 1
        for which in (slice(3, 13), slice(None), slice(last, None), [last, 0, 5, 5, 9], []):
            some = np.array(which, np.int64) if isinstance(which, list) else which
            np.testing.assert_array_equal(
                checkpoint.read_rows(name, some), weight[some], err_msg=f"{name} {which}"
            )


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_gptq_is_exact_in_its_own_bits(
    tmp_path: Path, bits: int, version: int, group: int
) -> None:
    pack = gptq(bits, group, version=version)
    config = gptq_config(bits, group, sym=True)
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    expected = write_checkpoint(tmp_path / "m", pack, config, which=EVERY)
    check(open_checkpoint(tmp_path / "m"), expected, bits, None if group == -1 else group)


@pytest.mark.parametrize("version", [1, 2])
def test_asymmetric_gptq_int4_is_exact_in_int8(tmp_path: Path, version: int) -> None:
    config = gptq_config(4, 16, sym=False, format=("gptq", "gptq_v2")[version - 1])
    pack = gptq(4, 16, sym=False, version=version, scale_type=np.float32)
    expected = write_checkpoint(tmp_path / "m", pack, config)
    check(open_checkpoint(tmp_path / "m"), expected, 8, 16)


def test_asymmetric_gptq_int8_is_read_but_has_no_codes(tmp_path: Path) -> None:
    config = gptq_config(8, 16, sym=False)
    expected = write_checkpoint(tmp_path / "m", gptq(8, 16, sym=False), config)
    check(open_checkpoint(tmp_path / "m"), expected, None, None)


@pytest.mark.parametrize("group", [16, -1])
def test_awq_is_exact_in_int8(tmp_path: Path, group: int) -> None:
    expected = write_checkpoint(tmp_path / "m", awq(group), awq_config(group, version="GEMM"))
    check(open_checkpoint(tmp_path / "m"), expected, 8, None if group == -1 else group)


@pytest.mark.parametrize("zero_point", [True, False])
def test_awq_with_central_zero_points_is_exact_in_int4(tmp_path: Path, zero_point: bool) -> None:
    config = awq_config(16, zero_point=zero_point)
    expected = write_checkpoint(tmp_path / "m", awq(16, sym=True), config)
    check(open_checkpoint(tmp_path / "m"), expected, 4, 16)


@pytest.mark.parametrize(
    ("pack", "storage", "weights", "exact_bits", "block"),
    [
        (compressed_packed(4, 16), "pack-quantized", integers(4, "group", 16), 4, 16),
        (compressed_packed(8, 16), "pack-quantized", integers(8, "group", 16), 8, 16),
        (compressed_packed(4, None), "pack-quantized", integers(4, "channel"), 4, None),
        (
            compressed_packed(4, 16, sym=False, scale_type=ml_dtypes.bfloat16),
            "pack-quantized",
            integers(4, "group", 16, symmetric=False),
            8,
            16,
        ),
        (
            compressed_packed(8, None, sym=False),
            "pack-quantized",
            integers(8, "channel", symmetric=False),
            None,
            None,
        ),
        (compressed_bytes(None), "int-quantized", integers(8, "channel"), 8, None),
        (compressed_bytes(16), "naive-quantized", integers(8, "group", 16), 8, 16),
        (compressed_bytes(0), "int-quantized", integers(8, "tensor"), 8, None),
        (
            compressed_bytes(None, low=-8, high=7),
            "int-quantized",
            integers(4, "channel"),
            4,
            None,
        ),
        (
            float8(None, "weight_scale", scale_shape="one"),
            "float-quantized",
            floats("tensor"),
            None,
            None,
        ),
        (float8((1, 0), "weight_scale"), "float-quantized", floats("channel"), None, None),
        (
            float8((20, 20), "weight_scale"),
            "naive-quantized",
            floats("block", block_structure=[20, 20]),
            None,
            None,
        ),
        (
            float8((1, 16), "weight_scale"),
            "float-quantized",
            floats("group", group_size=16),
            None,
            None,
        ),
    ],
)
def test_compressed_tensors_read_as_their_layout_says(
    tmp_path: Path,
    pack: Pack,
    storage: str,
    weights: dict[str, Any],
    exact_bits: int | None,
    block: int | None,
) -> None:
    expected = write_checkpoint(tmp_path / "m", pack, compressed_config(storage, weights))
    check(open_checkpoint(tmp_path / "m"), expected, exact_bits, block)


def test_asymmetric_bytes_are_codes_where_they_fit(tmp_path: Path) -> None:
    weights = integers(8, "channel", symmetric=False)
    pack = compressed_bytes(None, sym=False, low=-100, high=100)
    expected = write_checkpoint(tmp_path / "m", pack, compressed_config("int-quantized", weights))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.exact_bits().values()) == {8}
    for name, weight in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), weight)
        codes = checkpoint.read_quantized(name)
        assert codes is not None
        np.testing.assert_array_equal(codes.dequantize(), weight.T)


@pytest.mark.parametrize(
    ("pack", "more"),
    [
        (float8((20, 20), "weight_scale_inv"), {"weight_block_size": [20, 20]}),
        (float8((16, 16), "weight_scale_inv"), {"weight_block_size": [16, 16]}),
        (float8((128, 128), "weight_scale_inv"), {}),
        (float8(None, "weight_scale", scale_shape="scalar"), {"weight_block_size": None}),
        (float8(None, "weight_scale_inv", scale_shape="one"), {"activation_scheme": "static"}),
        (float8((1, 0), "weight_scale_inv", scale_shape="row"), {}),
    ],
)
def test_fp8_reads_as_its_layout_says(
    tmp_path: Path, pack: Pack, more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected = write_checkpoint(tmp_path / "m", pack, fp8_config(**more))
    check(open_checkpoint(tmp_path / "m"), expected, None, None)
    assert caplog.text.count("activations and KV cache are not quantised") == 1


def test_fp8_reads_as_transformers_dequantises(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    pack = float8((16, 16), "weight_scale_inv")
    names = write_checkpoint(tmp_path / "m", pack, fp8_config(weight_block_size=[16, 16]))
    checkpoint = open_checkpoint(tmp_path / "m")
    theirs, stored = Fp8Dequantize(None), load_file(tmp_path / "m/model.safetensors")
    for name in names:
        scales = stored[f"{name}_scale_inv"]
        weight = theirs._dequantize_one(stored[name], scales, torch.float32)
        np.testing.assert_array_equal(checkpoint.read(name), weight.numpy())


def test_slices_of_a_large_weight_join_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_export.checkpoint.quantized.weight.SLICE_VALUES", 1)
    monkeypatch.setattr("qwen_export.checkpoint.quantized.fp8.SLICE_VALUES", 1)
    weights = integers(4, "group", 16, symmetric=False)
    for i, (pack, config, bits, block) in enumerate(
        [
            (gptq(4, 16), gptq_config(4, 16), 4, 16),
            (awq(16), awq_config(16), 8, 16),
            (
                compressed_packed(4, 16, sym=False),
                compressed_config("pack-quantized", weights),
                8,
                16,
            ),
            (float8((20, 20), "weight_scale"), fp8_config(weight_block_size=[20, 20]), None, None),
        ]
    ):
        expected = write_checkpoint(tmp_path / str(i), pack, config)
        check(open_checkpoint(tmp_path / str(i)), expected, bits, block)


@pytest.mark.parametrize(
    ("pack", "config", "precision"),
    [
        (gptq(4, 16), gptq_config(4, 16, sym=True), "int4"),
        (gptq(4, 16, sym=False), gptq_config(4, 16, sym=False, desc_act=True), "int8"),
        (awq(16), awq_config(16), "int8"),
        (awq(16, sym=True), awq_config(16, zero_point=False), "int4"),
        (
            compressed_packed(4, 16),
            compressed_config("pack-quantized", integers(4, "group", 16)),
            "int4",
        ),
    ],
)
def test_headers_alone_tell_what_a_checkpoint_is(
    tmp_path: Path, pack: Pack, config: dict[str, Any], precision: str
) -> None:
    expected = write_checkpoint(tmp_path / "m", pack, config)
    file = tmp_path / "m/model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(data[:header] + bytes(len(data) - header))
    checkpoint = open_checkpoint(tmp_path / "m", hollow=True)
    assert checkpoint.quantized.keys() == expected.keys()
    assert native_precision(checkpoint.exact_bits(read=False).values()) == precision


def test_packed_rows_and_zero_points_need_not_fill_their_words(tmp_path: Path) -> None:
    weights = integers(4, "group", 10, symmetric=False)
    pack, shape = compressed_packed(4, 10, sym=False), (11, 20)
    parts, expected = pack("lm_head", shape, np.random.default_rng(0))
    path = tmp_path / "model.safetensors"
    save_file(parts, path)
    file = SafetensorsFile(path)
    stored = StoredTensors(dict.fromkeys(file.tensors, file), tmp_path)
    config = compressed_config("pack-quantized", weights, ignore=[])
    method = CompressedMethod.read(ConfigValues(config, tmp_path / "config.json"))
    weight = method.weight("lm_head.weight", shape, stored)
    assert weight is not None
    np.testing.assert_array_equal(weight.dequantize(), expected)


def test_modules_stored_plain_stay_plain(tmp_path: Path) -> None:
    only_mlp = re.compile(r".*mlp.*_proj\.weight")
    plain = open_checkpoint(Path(__file__).parents[1] / "data/golden/models/qwen2_untied")
    for i, (pack, config) in enumerate(
        [
            (gptq(4, 16), gptq_config(4, 16)),
            (awq(16), awq_config(16, modules_to_not_convert=["self_attn", "lm_head"])),
            (float8(None, "weight_scale_inv"), fp8_config(modules_to_not_convert=["lm_head"])),
            (
                compressed_packed(4, 16),
                compressed_config(
                    "pack-quantized",
                    integers(4, "group", 16),
                    ignore=["lm_head", "re:.*self_attn"],
                ),
            ),
        ]
    ):
        expected = write_checkpoint(tmp_path / str(i), pack, config, which=only_mlp)
        checkpoint = open_checkpoint(tmp_path / str(i))
        assert checkpoint.quantized.keys() == expected.keys()
        assert checkpoint.tensors.keys() == plain.tensors.keys()
        name = "model.layers.0.self_attn.q_proj.weight"
        np.testing.assert_array_equal(checkpoint.read(name), plain.read(name))


def test_closest_target_of_compressed_tensors_decides(tmp_path: Path) -> None:
    wide, narrow = compressed_packed(8, None), compressed_packed(4, 16)

    def pack(module: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
        is_narrow = module == DOWN or "q_proj" in module
        return (narrow if is_narrow else wide)(module, shape, rng)

    groups = {
        "group_0": {"targets": ["Linear"], "weights": integers(8, "channel")},
        "group_1": {"targets": [DOWN, "re:.*q_proj"], "weights": integers(4, "group", 16)},
    }
    config = compressed_config("pack-quantized", {}, config_groups=groups)
    expected = write_checkpoint(tmp_path / "m", pack, config)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name, weight in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name), weight)
    assert checkpoint.quantized[f"{DOWN}.weight"].exact_bits == 4
    assert checkpoint.quantized[f"{UP}.weight"].exact_bits == 8
    assert native_precision(checkpoint.exact_bits().values()) == "int8"


def test_compressed_embedding_and_head_are_read_too(tmp_path: Path) -> None:
    groups = {"group_0": {"targets": ["Linear", "Embedding"], "weights": integers(4, "group", 16)}}
    config = compressed_config("pack-quantized", {}, config_groups=groups, ignore=[])
    every = re.compile(r".*(_proj|lm_head|embed_tokens)\.weight")
    expected = write_checkpoint(tmp_path / "m", compressed_packed(4, 16), config, which=every)
    check(open_checkpoint(tmp_path / "m"), expected, 4, 16)


def test_zero_biases_of_packed_layers_are_harmless(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", gptq(4, 16), gptq_config(4, 16))
    bias = f"{UP}.bias"
    change_tensors(tmp_path / "m", lambda t: t.update({bias: np.zeros(48, np.float16)}))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert bias in checkpoint.harmless
    assert bias not in checkpoint.tensors
    assert f"{UP}.g_idx" in checkpoint.harmless


def test_scales_of_activations_and_caches_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = compressed_config(
        "float-quantized", floats("tensor"), kv_cache_scheme=floats("tensor")
    )
    config["config_groups"]["group_0"]["input_activations"] = floats("tensor", dynamic=False)
    pack = float8(None, "weight_scale", scale_shape="one")
    expected = write_checkpoint(tmp_path / "m", pack, config)
    one = np.ones(1, np.float32)
    names = {f"{UP}.input_scale", "model.layers.0.self_attn.k_scale"}
    change_tensors(tmp_path / "m", lambda t: t.update(dict.fromkeys(names, one)))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.harmless) == names
    assert (
        "quantised activations and kv_cache_scheme of quantization_config left out" in caplog.text
    )
    check(checkpoint, expected, None, None)


def test_quantised_head_beside_a_plain_tied_table_is_a_table_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "m", gptq(4, 16), gptq_config(4, 16), model="qwen2_tied")

    def add_head(tensors: dict[str, Any]) -> None:
        shape = tensors["model.embed_tokens.weight"].shape
        tensors.update(gptq(4, 16)("lm_head", shape, np.random.default_rng(0))[0])

    assert open_checkpoint(tmp_path / "m").resolve_tying().tied
    change_tensors(tmp_path / "m", add_head)
    # A large head is not unpacked for that: it has no such method any more.
    monkeypatch.delattr(IntegerWeight, "rows")
    tying = open_checkpoint(tmp_path / "m").resolve_tying()
    assert (tying.tied, tying.lm_head) == (False, "lm_head.weight")


def test_two_quantised_tables_are_one_where_their_parts_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "m", gptq(4, 16), gptq_config(4, 16), model="qwen2_tied")

    def pack_tables(tensors: dict[str, Any]) -> None:
        shape = tensors.pop("model.embed_tokens.weight").shape
        for module in ("lm_head", "model.embed_tokens"):
            tensors.update(gptq(4, 16)(module, shape, np.random.default_rng(0))[0])

    def spoil(tensors: dict[str, Any]) -> None:
        tensors["lm_head.scales"][-1, -1] *= 2

    change_tensors(tmp_path / "m", pack_tables)
    monkeypatch.delattr(IntegerWeight, "rows")
    tying = open_checkpoint(tmp_path / "m").resolve_tying()
    assert (tying.tied, tying.lm_head) == (True, "model.embed_tokens.weight")
    change_tensors(tmp_path / "m", spoil)
    tying = open_checkpoint(tmp_path / "m").resolve_tying()
    assert (tying.tied, tying.lm_head) == (False, "lm_head.weight")


def test_transformers_reads_the_config_without_the_packages_of_the_method(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for i, (pack, config) in enumerate(
        [
            (gptq(4, 16), gptq_config(4, 16)),
            (awq(16), awq_config(16)),
            (float8((16, 16), "weight_scale_inv"), fp8_config(weight_block_size=[16, 16])),
            (
                compressed_packed(4, 16),
                compressed_config("pack-quantized", integers(4, "group", 16)),
            ),
        ]
    ):
        write_checkpoint(tmp_path / str(i), pack, config, which=LINEAR)
        theirs = AutoConfig.from_pretrained(tmp_path / str(i), local_files_only=True)
        assert (theirs.model_type, theirs.hidden_size) == ("qwen2", 32)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen2_tied", "qwen3_tied_bias"])
def test_plain_bundle_of_a_quantised_checkpoint_passes_parity(tmp_path: Path, model: str) -> None:
    from qwen_export.bundle import BuildOptions, build

    write_checkpoint(tmp_path / "m", gptq(4, 16), gptq_config(4, 16), model=model)
    bundle = build(tmp_path / "m", tmp_path / "b", BuildOptions(precision="fp32"))
    assert bundle.manifest.parity.status == "passed"
