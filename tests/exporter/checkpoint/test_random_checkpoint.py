from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from qwen_export.checkpoint import (
    ModelConfig,
    expected_tensors,
    open_checkpoint,
    require_supported,
)

SCRIPT = Path(__file__).parents[3] / "benchmarks/random_checkpoint.py"

# Parameters as the model cards and safetensors metadata on the hub count them, tied tables once.
PUBLISHED = {
    "Qwen2-0.5B": 494_032_768,
    "Qwen2-1.5B": 1_543_714_304,
    "Qwen2-7B": 7_615_616_512,
    "Qwen2-72B": 72_706_203_648,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("random_checkpoint", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["random_checkpoint"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    for model_type, tied in (("qwen2", True), ("qwen3", False)):
        module.SHAPES[f"tiny-{model_type}"] = module.Shape(
            model_type, 64, 96, 3, 4, 2, tied, vocab=20_001, head_dim=16
        )
    return module


def test_every_shape_has_the_published_number_of_parameters(script: ModuleType) -> None:
    counted = {}
    for name in script.SHAPES:
        if not name.startswith("tiny-"):
            config = ModelConfig.from_dict(script.config_dict(name))
            require_supported(config)
            counted[name] = sum(int(np.prod(s)) for s in expected_tensors(config).values())
    assert counted == PUBLISHED


@pytest.mark.parametrize("shape", ["tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_checkpoint_opens_and_has_plausible_weights(
    script: ModuleType, tmp_path: Path, shape: str, dtype: str
) -> None:
    written = script.write_checkpoint(shape, tmp_path, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.dtype == script.DTYPES[dtype][0]
    assert checkpoint.config.ignored_keys == ()
    assert checkpoint.generation_config["top_k"] == 20
    assert written == sum(info.num_bytes for info in checkpoint.tensors.values())
    table = checkpoint.read("model.embed_tokens.weight").astype(np.float32)
    assert abs(table.std() - 0.02) < 2e-4
    assert abs(table.mean()) < 2e-4
    assert len(np.unique(table, axis=0)) == len(table)
    norms = checkpoint.read("model.norm.weight").astype(np.float32)
    assert abs(norms.mean() - 1) < 0.05
    assert 0.05 < norms.std() < 0.2
    for name in checkpoint.tensors:
        checkpoint.check_finite(name, checkpoint.read(name))


def test_same_seed_writes_the_same_bytes(script: ModuleType, tmp_path: Path) -> None:
    data = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        script.write_checkpoint("tiny-qwen3", tmp_path / folder, seed=seed)
        data.append((tmp_path / folder / "model.safetensors").read_bytes())
    assert data[0] == data[1]
    assert data[0] != data[2]


def test_tensors_of_one_shape_differ(script: ModuleType, tmp_path: Path) -> None:
    script.write_checkpoint("tiny-qwen2", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    names = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(3) for p in ("gate", "up")]
    assert len({checkpoint.read(name).tobytes() for name in names}) == 6


def test_large_checkpoints_are_cut_into_shards(script: ModuleType, tmp_path: Path) -> None:
    script.write_checkpoint("tiny-qwen3", tmp_path, layers=5, shard_bytes=100_000)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.num_hidden_layers == 5
    assert checkpoint.tensors.keys() == expected_tensors(checkpoint.config).keys()
    files = sorted(path.name for path in checkpoint.files)
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    for file in checkpoint.files.values():
        size = sum(info.num_bytes for info in file.tensors.values())
        assert size <= 100_000 or tables & file.tensors.keys()


def test_transformers_runs_the_checkpoint(script: ModuleType, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    script.write_checkpoint("tiny-qwen3", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    logits = model(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 10


def test_command_line_writes_and_reports(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert script.main(["tiny-qwen2", str(out), "--seed", "3", "--layers", "1"]) == 0
    assert open_checkpoint(out).config.num_hidden_layers == 1
    assert f"{out}: 3 MB in" in capsys.readouterr().out
    assert script.main(["tiny-qwen2", str(out)]) == 1
    assert "must be empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Qwen9-1B", "out"], "invalid choice: 'Qwen9-1B'"),
        (["tiny-qwen2", "out", "--layers", "0"], "--layers must be >= 1, got 0"),
        (["tiny-qwen2", "out", "--seed", "-1"], "--seed must be >= 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(
    script: ModuleType,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert message in capsys.readouterr().err
