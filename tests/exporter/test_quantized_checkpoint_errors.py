"""What a quantised checkpoint is refused for, each in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter.quantized_layouts import (
    Array,
    awq,
    change_tensors,
    compressed_bytes,
    compressed_packed,
    float8,
    gptq,
    write_checkpoint,
)

from qwen_export.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from qwen_export.checkpoint.quantized import read_method
from qwen_export.errors import CheckpointError, UnsupportedModelError

UP = "model.layers.1.mlp.up_proj"
Change = Callable[[dict[str, Array]], None]

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}


def compressed(
    storage: str = "pack-quantized", weights: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": INT4 if weights is None else weights}
    groups = {"group_0": group}
    common = {"quant_method": "compressed-tensors", "format": storage, "config_groups": groups}
    return {**common, "ignore": ["lm_head"], **more}


def read(quantization: Any) -> object:
    raw = {"model_type": "qwen2", "quantization_config": quantization}
    return read_method(ModelConfig.from_dict(raw))


@pytest.mark.parametrize(
    "method",
    ["bitsandbytes", "hqq", "quanto", "mxfp4", "nvfp4", "gguf", "modelopt", "auto-round", "new"],
)
def test_other_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=rf"quantization_config\.quant_method '{method}' is not supported; gptq, awq, "
        "compressed-tensors, fp8 are: build from the original checkpoint",
    ) as e:
        read({"quant_method": method})
    assert e.value.key == "quantization_config.quant_method"


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({**GPTQ, "bits": 3}, r"bits 3 is not supported; 4 and 8 are"),
        ({**GPTQ, "bits": 2}, r"bits 2 is not supported"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ({**GPTQ, "format": "bitblas"}, "format 'bitblas' is not supported; gptq and gptq_v2 are"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format True is not supported; the plain"),
        ({**GPTQ, "dynamic": {"+:x": {}}}, "dynamic .* is not supported; one setting for all"),
        ({**GPTQ, "pack_dtype": "int64"}, "pack_dtype 'int64' is not supported; int32 is"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' is not supported; 'gemm' is"),
        ({**AWQ, "version": "GEMV_FAST"}, "version 'GEMV_FAST' is not supported"),
        ({**AWQ, "bits": 8}, "bits 8 is not supported; 4 is"),
        ({**AWQ, "backend": "llm-awq"}, "backend 'llm-awq' is not supported"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2' is not supported; 'e4m3' is"),
        ({**FP8, "activation_scheme": "odd"}, "activation_scheme 'odd' is not supported"),
        (compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
        (compressed("marlin-24"), "format 'marlin-24' is not supported"),
        (compressed(weights={**INT4, "num_bits": 3}), r"weights\.num_bits 3 is not supported"),
        (compressed(weights={**INT4, "type": "nf"}), r"weights\.type 'nf' is not supported"),
        (compressed(weights={**INT4, "odd": 1}), r"weights\.odd 1 is not supported"),
        (
            compressed(weights={**INT4, "strategy": "tensor_group"}),
            r"weights\.strategy 'tensor_group' is not supported",
        ),
        (
            compressed(weights={"num_bits": 4, "type": "float", "strategy": "channel"}),
            "4-bit symmetric float' is not supported",
        ),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config .* dense"),
        (compressed(transform_config={"config_groups": {"u": {}}}), "transform_config .* is not"),
        (compressed(quantization_status="frozen"), "quantization_status 'frozen' is not"),
    ],
)
def test_settings_that_are_not_supported_are_named(
    quantization: dict[str, Any], message: str
) -> None:
    with pytest.raises(
        UnsupportedModelError, match=rf"config\.json: quantization_config.*{message}"
    ):
        read(quantization)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ([1], "quantization_config must be an object or null"),
        ({"bits": 4}, "quant_method must be one of gptq, awq, compressed-tensors, fp8, got None"),
        ({**GPTQ, "bits": True}, "bits must be an integer >= 1, got True"),
        (
            {**GPTQ, "group_size": 0},
            "group_size must be an integer >= 1, or -1 for all inputs, go",
        ),
        ({**GPTQ, "group_size": None}, "group_size must be an integer >= 1, or -1 for all inputs"),
        ({**AWQ, "group_size": True}, "group_size must be an integer >= 1, or -1 for all inputs"),
        ({**GPTQ, "sym": 1}, "sym must be true or false, got 1"),
        ({**AWQ, "modules_to_not_convert": "lm_head"}, "must be a list of module names or null"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size must be two integers >= 1"),
        ({**FP8, "weight_block_size": [True, 16]}, "weight_block_size must be two integers"),
        (compressed(config_groups={}), "config_groups must name at least one group"),
        (
            compressed(config_groups={"W4A16": ["Linear"]}),
            r"config_groups\.W4A16 must be an object",
        ),
        (compressed(config_groups={"g": {"targets": "Linear"}}), "targets must be a list of"),
        (compressed(ignore=[3]), "ignore must be a list of module names"),
        (compressed(ignore=["re:("]), r"ignore must hold valid patterns \("),
        (compressed(weights={**INT4, "group_size": None}), "group_size must be an integer >= 1"),
        (
            compressed(weights={**INT4, "strategy": "channel"}),
            "group_size must be null with strategy 'channel', got 16",
        ),
        (
            compressed(weights={"num_bits": 8, "type": "float", "strategy": "block"}),
            "block_structure must be two integers >= 1, got None",
        ),
    ],
)
def test_wrong_settings_are_named(quantization: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(quantization)


@pytest.mark.parametrize("name", ["GPTQ", "Gptq"])
def test_the_method_s_name_may_be_written_in_capitals(name: str) -> None:
    assert read({**GPTQ, "quant_method": name}) == read(GPTQ)


def test_unknown_settings_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    read({**GPTQ, "novelty": 1, "empty": None})
    assert "ignored unknown keys: quantization_config.novelty" in caplog.text
    assert "empty" not in caplog.text


def damaged(
    folder: Path, change: Change, pack: Any = None, config: dict[str, Any] | None = None
) -> Checkpoint:
    write_checkpoint(folder, pack or gptq(4, 16), config or GPTQ)
    change_tensors(folder, change)
    return open_checkpoint(folder)


def put(name: str, value: Array) -> Change:
    return lambda tensors: tensors.update({name: value})


def remove(name: str) -> Change:
    return lambda tensors: tensors.pop(name) is None


@pytest.mark.parametrize("part", ["scales", "qzeros"])
def test_missing_part_of_gptq_is_named(tmp_path: Path, part: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"up_proj\.{part}: expected \[2, .* \(groups, outputs.*but no saf"
    ):
        damaged(tmp_path / "m", remove(f"{UP}.{part}"))


@pytest.mark.parametrize(
    ("pack", "config", "part"),
    [
        (float8((16, 16), "weight_scale_inv"), FP8, "weight_scale_inv"),
        (compressed_packed(4, 16), compressed(), "weight_scale"),
        (
            compressed_packed(4, 16, sym=False),
            compressed(weights={**INT4, "symmetric": False}),
            "weight_zero_point",
        ),
        (awq(16), AWQ, "scales"),
    ],
)
def test_missing_scales_and_zero_points_are_named(
    tmp_path: Path, pack: Any, config: dict[str, Any], part: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"{UP}\.{part}: expected .* but no safetensors"):
        damaged(tmp_path / "m", remove(f"{UP}.{part}"), pack, config)


@pytest.mark.parametrize(
    ("pack", "config", "part", "value", "message"),
    [
        (
            gptq(4, 16),
            GPTQ,
            "qweight",
            np.zeros((8, 48), np.int32),
            r"qweight: expected \[4, 48\] \(inputs/8, outputs\), got \[8, 48\] in model\.saf",
        ),
        (
            gptq(4, 16),
            GPTQ,
            "qweight",
            np.zeros((4, 48), np.float32),
            "qweight must be stored as int32, got float32",
        ),
        (
            gptq(4, 16),
            GPTQ,
            "g_idx",
            np.zeros(31, np.int32),
            r"g_idx: expected \[32\] \(inputs\), got \[31\]",
        ),
        (
            awq(16),
            AWQ,
            "qzeros",
            np.zeros((2, 48), np.int32),
            r"qzeros: expected \[2, 6\] \(groups, outputs/8\), got \[2, 48\]",
        ),
        (
            float8((16, 16), "weight_scale_inv"),
            FP8,
            "weight_scale_inv",
            np.zeros((3, 3), np.float32),
            r"weight_scale_inv: expected \[3, 2\] \(one for each 16x16 block\), got \[3, 3\]",
        ),
        (
            compressed_packed(4, 16),
            compressed(),
            "weight_shape",
            np.array([32, 48]),
            r"weight_shape must be \[48, 32\], as config\.json .* got \[32, 48\]",
        ),
    ],
)
def test_parts_of_another_shape_or_type_are_named(
    tmp_path: Path, pack: Any, config: dict[str, Any], part: str, value: Array, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        damaged(tmp_path / "m", put(f"{UP}.{part}", value), pack, config)


@pytest.mark.parametrize(
    ("pack", "config"),
    [
        (gptq(4, 16), {**GPTQ, "group_size": 20}),
        (awq(16), {**AWQ, "group_size": 20}),
        (compressed_packed(4, 16), compressed(weights={**INT4, "group_size": 20})),
    ],
)
def test_group_size_that_does_not_divide_is_an_error(
    tmp_path: Path, pack: Any, config: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path / "m", pack, config)
    with pytest.raises(
        CheckpointError,
        match=r"group_size must divide the 32 inputs of model\.layers\.0\..*weight, got 20",
    ):
        open_checkpoint(tmp_path / "m")


def test_activation_order_is_refused_by_name(tmp_path: Path) -> None:
    order = np.array([k % 2 for k in range(32)], np.int32)
    with pytest.raises(
        UnsupportedModelError,
        match=r"up_proj\.g_idx puts input 1 into group 1 instead of 0: .* \(desc_act, actorder\)",
    ):
        damaged(tmp_path / "a", put(f"{UP}.g_idx", order), config={**GPTQ, "desc_act": True})
    change = put(f"{UP}.weight_g_idx", order)
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.weight_g_idx puts input 1"):
        damaged(tmp_path / "b", change, compressed_packed(4, 16), compressed())


def test_one_unset_group_does_not_hide_activation_order(tmp_path: Path) -> None:
    order = np.array([k % 2 for k in range(32)], np.int32)
    order[31] = -1
    with pytest.raises(UnsupportedModelError, match=r"up_proj\.g_idx puts input 1 into group 1"):
        damaged(tmp_path / "m", put(f"{UP}.g_idx", order), config={**GPTQ, "desc_act": True})


def test_activation_order_that_changes_nothing_is_accepted(tmp_path: Path) -> None:
    unset = np.full(32, -1, np.int32)
    change = put(f"{UP}.weight_g_idx", unset)
    damaged(tmp_path / "a", change, compressed_packed(4, 16), compressed())
    write_checkpoint(tmp_path / "b", gptq(4, 16), {**GPTQ, "desc_act": True})
    assert set(open_checkpoint(tmp_path / "b").exact_bits().values()) == {4}


def test_activation_order_without_its_groups_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"up_proj\.g_idx must be there, because .*desc_act"):
        damaged(tmp_path / "m", remove(f"{UP}.g_idx"), config={**GPTQ, "desc_act": True})


def test_zero_points_that_contradict_the_config_are_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", gptq(4, 16, version=2), GPTQ)
    with pytest.raises(
        CheckpointError,
        match=r"qzeros must hold the zero point 8 alone, .*sym is true, but holds 9",
    ):
        open_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", awq(16), {**AWQ, "zero_point": False})
    with pytest.raises(
        CheckpointError, match=r"zero point 8 alone, because .*zero_point is false"
    ):
        open_checkpoint(tmp_path / "b")


def test_zero_point_that_version_1_of_gptq_cannot_hold_is_refused(tmp_path: Path) -> None:
    change = put(f"{UP}.qzeros", np.full((2, 6), -1, np.int32))
    with pytest.raises(UnsupportedModelError, match="holds the zero point 16, which version 1 of"):
        damaged(tmp_path / "m", change, gptq(4, 16, sym=False), {**GPTQ, "sym": False})


@pytest.mark.parametrize(
    ("pack", "config"),
    [
        (awq(16), {**AWQ, "modules_to_not_convert": ["mlp"]}),
        (gptq(4, 16), {**GPTQ, "modules_to_not_convert": ["model.layers.1.mlp.up_proj"]}),
        (float8((16, 16), "weight_scale_inv"), {**FP8, "ignored_layers": ["layers.0"]}),
    ],
)
def test_quantised_module_that_is_listed_as_plain_is_an_error(
    tmp_path: Path, pack: Any, config: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path / "m", pack, config)
    with pytest.raises(CheckpointError, match=r"is quantised, but quantization_config.* lists '"):
        open_checkpoint(tmp_path / "m")


def test_quantised_module_outside_all_groups_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m", compressed_packed(4, 16), compressed(ignore=[UP]))
    with pytest.raises(
        CheckpointError, match=rf"{UP}\.weight_packed in .* ignore .* leave {UP} as it is"
    ):
        open_checkpoint(tmp_path / "m")


def test_bias_that_the_model_has_not_must_be_zero(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"up_proj\.bias in .* must be zero, because the"):
        damaged(tmp_path / "m", put(f"{UP}.bias", np.ones(48, np.float16)))


def test_unused_zero_point_must_be_zero(tmp_path: Path) -> None:
    pack, config = compressed_bytes(None), compressed("int-quantized", {**INT4, "num_bits": 8})
    config["config_groups"]["group_0"]["weights"].update(strategy="channel", group_size=None)
    name = f"{UP}.weight_zero_point"
    damaged(tmp_path / "a", put(name, np.zeros((48, 1), np.int8)), pack, config)
    with pytest.raises(CheckpointError, match=r"weight_zero_point in .* must be zero"):
        damaged(tmp_path / "b", put(name, np.ones((48, 1), np.int8)), pack, config)


def test_plain_weight_beside_a_packed_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{UP}\.weight and {UP}\.qweight are both stored"):
        damaged(tmp_path / "m", put(f"{UP}.weight", np.zeros((48, 32), np.float32)))


def test_unknown_part_of_a_quantised_layer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{UP}\.lut \[4\] in .* is not part of the qwen2"):
        damaged(tmp_path / "m", put(f"{UP}.lut", np.zeros(4, np.float32)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scale_that_is_not_finite_is_an_error_when_read(tmp_path: Path, bad: float) -> None:
    def spoil(tensors: dict[str, Array]) -> None:
        tensors[f"{UP}.scales"][1, 3] = bad

    checkpoint = damaged(tmp_path / "m", spoil)
    for reading in (checkpoint.read, checkpoint.read_quantized):
        with pytest.raises(CheckpointError, match=rf"{UP}\.scales in .* must hold finite scales"):
            reading(f"{UP}.weight")


def test_codes_with_more_bits_than_configured_are_an_error_when_read(tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    write_checkpoint(tmp_path / "m", compressed_bytes(None), compressed("int-quantized", weights))
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=rf"{UP}\.weight in .* must hold codes of 4 bits, as"
    ):
        checkpoint.read_quantized(f"{UP}.weight")


def test_quantised_weights_without_a_config_say_what_to_add(tmp_path: Path) -> None:
    for i, pack in enumerate([gptq(4, 16), float8((16, 16), "weight_scale_inv")]):
        write_checkpoint(tmp_path / str(i), pack, {})
        with pytest.raises(
            CheckpointError,
            match=r"if the checkpoint is quantised, .* must have the quantization_.*there is empty$",
        ):
            open_checkpoint(tmp_path / str(i))
