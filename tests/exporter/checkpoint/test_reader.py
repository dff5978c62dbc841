from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from qwen_export.checkpoint import open_checkpoint
from qwen_export.errors import CheckpointError

NORM = "model.norm.weight"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
CopyOf = Callable[[str], Path]
EditJson = Callable[..., None]


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen2_sharded", "qwen3_tied_bias"])
def test_tensors_read_as_the_library_reads_them(golden_models: Path, name: str) -> None:
    checkpoint = open_checkpoint(golden_models / name)
    expected = {}
    for file in (golden_models / name).glob("*.safetensors"):
        expected.update(load_file(file))
    assert checkpoint.tensors.keys() == expected.keys()
    for tensor, value in expected.items():
        read = checkpoint.read(tensor)
        assert read.dtype == value.dtype
        np.testing.assert_array_equal(read, value)


def test_bfloat16_is_read_in_its_own_type(golden_models: Path) -> None:
    checkpoint = open_checkpoint(golden_models / "qwen2_bf16")
    theirs = load_torch_file(golden_models / "qwen2_bf16/model.safetensors")
    for name, value in theirs.items():
        read = checkpoint.read(name)
        assert read.dtype == ml_dtypes.bfloat16
        assert checkpoint.tensors[name].dtype == "bfloat16"
        np.testing.assert_array_equal(read.astype(np.float32), value.float().numpy())


def test_float16_is_read_in_its_own_type(copy_of: CopyOf) -> None:
    folder = copy_of("qwen2_untied")
    file = folder / "model.safetensors"
    save_file({k: v.astype(np.float16) for k, v in load_file(file).items()}, file)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.read(NORM).dtype == np.float16


def test_views_are_read_only_and_share_the_file(golden_models: Path) -> None:
    view = open_checkpoint(golden_models / "qwen2_untied").read(NORM)
    assert not view.flags.writeable
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_views_stay_valid_after_release(golden_models: Path) -> None:
    checkpoint = open_checkpoint(golden_models / "qwen2_untied")
    name = "model.embed_tokens.weight"
    view = checkpoint.read(name)
    before = view.copy()
    checkpoint.release(name)
    np.testing.assert_array_equal(view, before)


def resident_file_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssFile:")[1].split()[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_release_gives_memory_back(copy_of: CopyOf, edit_json: EditJson) -> None:
    folder = copy_of("qwen2_untied")
    rows = 1 << 17  # 16 MiB of float32
    edit_json(folder / "config.json", vocab_size=rows)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.ones((rows, 32), np.float32)
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    before = resident_file_kib()
    assert checkpoint.read("lm_head.weight").sum() == rows * 32
    touched = resident_file_kib()
    checkpoint.release("lm_head.weight")
    assert touched - before > 15_000
    assert resident_file_kib() - before < 1_000


def test_generation_config_comes_from_its_file(golden_models: Path) -> None:
    path = golden_models / "qwen2_instruct"
    expected = json.loads((path / "generation_config.json").read_text())
    assert dict(open_checkpoint(path).generation_config) == expected


def test_token_ids_of_the_config_serve_without_a_generation_config(
    copy_of: CopyOf, edit_json: EditJson
) -> None:
    folder = copy_of("qwen2_instruct")
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=[126, 125])
    expected = {"bos_token_id": 125, "eos_token_id": [126, 125]}
    assert dict(open_checkpoint(folder).generation_config) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_that_are_not_finite_are_refused(
    golden_models: Path, bad: float, dtype: Any
) -> None:
    checkpoint = open_checkpoint(golden_models / "qwen2_untied")
    # The largest finite value of the type is no infinity.
    block = np.array([[0, -1, 1e-7], [1, 2, 3]], dtype)
    block[0, 0] = ml_dtypes.finfo(dtype).max
    checkpoint.check_finite(NORM, block)
    block[1, 2] = bad
    kind = "NaN" if np.isnan(bad) else "infinite"
    with pytest.raises(
        CheckpointError, match=rf"{NORM} in model\.safetensors must hold finite .* is {kind};"
    ):
        checkpoint.check_finite(NORM, block)


def test_last_value_of_a_large_block_is_checked(golden_models: Path) -> None:
    checkpoint = open_checkpoint(golden_models / "qwen2_untied")
    block = np.ones((1000, 1001), ml_dtypes.bfloat16)
    checkpoint.check_finite(NORM, block)
    block[-1, -1] = np.nan
    with pytest.raises(CheckpointError, match="must hold finite numbers, but one is NaN"):
        checkpoint.check_finite(NORM, block)
    # Blocks may be transposed or empty.
    with pytest.raises(CheckpointError, match="must hold finite numbers, but one is NaN"):
        checkpoint.check_finite(NORM, block.T)
    checkpoint.check_finite(NORM, block[:0])


def test_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing does not exist, and is not a hub id"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="nothing does not exist, and is not a hub id"):
        open_checkpoint("nothing")
    # A Path is never a hub id.
    with pytest.raises(CheckpointError, match="some/model does not exist"):
        open_checkpoint(Path("some/model"))


def test_file_in_place_of_a_folder_is_an_error(golden_models: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is a file; give the folder"):
        open_checkpoint(golden_models / "qwen2_tied/config.json")


def test_folder_without_config_is_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no config\.json"):
        open_checkpoint(tmp_path)


def test_revision_of_a_folder_is_an_error(golden_models: Path) -> None:
    with pytest.raises(CheckpointError, match="revision 'main' is for hub ids, but"):
        open_checkpoint(golden_models / "qwen2_tied", revision="main")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model_type": "qwen2",', "must be valid JSON, but line 1 column 24 is not"),
        (b'{"rms_norm_eps": NaN}', "must be valid JSON, but it holds NaN"),
        (b"[]", "must hold a JSON object, but holds a list"),
        (b'{"model_type": "\xff"}', "must be UTF-8 text, but byte 16 is not"),
    ],
)
def test_damaged_config_is_an_error(copy_of: CopyOf, content: bytes, message: str) -> None:
    folder = copy_of("qwen2_tied")
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
        open_checkpoint(folder)


def test_config_that_contradicts_the_tensors_is_an_error(
    copy_of: CopyOf, edit_json: EditJson
) -> None:
    folder = copy_of("qwen2_tied")
    edit_json(folder / "config.json", intermediate_size=64)
    with pytest.raises(
        CheckpointError,
        match=r"mlp\.gate_proj\.weight: expected \[64, 32\] \(intermediate_size, hidden_size\) "
        r"from config\.json, got \[48, 32\] in model\.safetensors",
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [4, 300, -1])
def test_truncated_weights_are_an_error(copy_of: CopyOf, keep: int) -> None:
    folder = copy_of("qwen2_tied")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"must be a complete safetensors file, but is trunc"
    ):
        open_checkpoint(folder)


def test_missing_shard_is_an_error(copy_of: CopyOf) -> None:
    folder = copy_of("qwen2_sharded")
    (folder / SHARD).unlink()
    with pytest.raises(CheckpointError, match=rf"{SHARD} is missing; {INDEX} names it for model"):
        open_checkpoint(folder)


def test_tensor_absent_from_its_shard_is_an_error(copy_of: CopyOf) -> None:
    folder = copy_of("qwen2_sharded")
    tensors = load_file(folder / SHARD)
    gone = min(tensors)
    del tensors[gone]
    save_file(tensors, folder / SHARD)
    with pytest.raises(
        CheckpointError, match=rf"{gone} must be in {SHARD}, where {INDEX} puts it"
    ):
        open_checkpoint(folder)


def test_tensor_that_the_index_does_not_name_is_an_error(
    copy_of: CopyOf, edit_json: EditJson
) -> None:
    folder = copy_of("qwen2_sharded")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    gone = next(name for name, file in weight_map.items() if file == SHARD)
    del weight_map[gone]
    edit_json(folder / INDEX, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=rf"{gone} is in {SHARD}, but {INDEX} does not put"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({NORM: "../x.safetensors"}, "must be mapped to a file of the same folder"),
        ({NORM: 3}, "must be mapped to a file of the same folder, got 3"),
        ({}, "must hold a weight_map from tensor to file"),
    ],
)
def test_wrong_index_is_an_error(
    copy_of: CopyOf, edit_json: EditJson, weight_map: dict[str, Any], message: str
) -> None:
    folder = copy_of("qwen2_sharded")
    edit_json(folder / INDEX, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_single_file_comes_before_an_index(copy_of: CopyOf) -> None:
    folder = copy_of("qwen2_untied")
    (folder / INDEX).write_text("not read")
    assert NORM in open_checkpoint(folder).tensors


@pytest.mark.parametrize(
    ("others", "found"),
    [(["pytorch_model.bin"], r"only pytorch_model\.bin"), ([], "no weights")],
)
def test_folder_without_safetensors_is_an_error(
    copy_of: CopyOf, others: list[str], found: str
) -> None:
    folder = copy_of("qwen2_tied")
    (folder / "model.safetensors").unlink()
    for name in others:
        (folder / name).write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=rf"holds {found}; a checkpoint must have model\.saf"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(("dtype", "stored"), [(np.float64, "F64"), (np.int32, "int32")])
def test_unsupported_type_of_a_tensor_is_an_error(
    copy_of: CopyOf, dtype: Any, stored: str
) -> None:
    folder = copy_of("qwen2_tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM] = tensors[NORM].astype(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"{NORM} in model\.safetensors is stored as {stored}, which is not"
    ):
        open_checkpoint(folder)


def test_opening_needs_neither_torch_nor_transformers(golden_models: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "from qwen_export.checkpoint import open_checkpoint\n"
        f"assert open_checkpoint({str(golden_models / 'qwen2_tied')!r}).tokenizer_files() is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
