from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_export.checkpoint import (
    ModelConfig,
    TensorInfo,
    check_tensors,
    expected_tensors,
    open_checkpoint,
    resolve_tying,
)
from qwen_export.errors import CheckpointError

GOLDEN = Path(__file__).parents[2] / "data/golden/models"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def small_config(**changes: Any) -> ModelConfig:
    raw = json.loads((GOLDEN / "qwen2_untied/config.json").read_text())
    return ModelConfig.from_dict({**raw, **changes})


def available(config: ModelConfig, **changes: tuple[int, ...] | None) -> dict[str, TensorInfo]:
    """What a sound checkpoint of a config holds, with tensors replaced, added or (None) removed."""
    shapes = {**expected_tensors(config), **changes}
    file = Path("/models/x/model-00002-of-00003.safetensors")
    return {
        name: TensorInfo("float32", shape, file, 0, 0)
        for name, shape in shapes.items()
        if shape is not None
    }


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_expected_tensors_are_the_parameters_of_transformers(name: str) -> None:
    import torch

    theirs = AutoConfig.from_pretrained(GOLDEN / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    config = ModelConfig.from_dict(json.loads((GOLDEN / name / "config.json").read_text()))
    assert expected_tensors(config) == shapes


def test_wrong_shape_names_dimensions_config_and_file() -> None:
    config = small_config(num_key_value_heads=4)
    name = "model.layers.1.self_attn.k_proj.weight"
    message = (
        f"{name}: expected [32, 32] (num_key_value_heads*head_dim, hidden_size) from config.json, "
        "got [16, 32] in model-00002-of-00003.safetensors"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$") as e:
        check_tensors(config, available(config, **{name: (16, 32)}))
    assert e.value.path == Path("/models/x/model-00002-of-00003.safetensors")


def test_missing_tensor_is_named_with_its_shape() -> None:
    config = small_config()
    gone = {f"model.layers.1.mlp.{part}_proj.weight": None for part in ("up", "down")}
    with pytest.raises(
        CheckpointError,
        match=r"model\.layers\.1\.mlp\.up_proj\.weight: expected \[48, 32\] \(intermediate_size, "
        r"hidden_size\) from config\.json, but no safetensors file .* \(and 1 more like it\)",
    ):
        check_tensors(config, available(config, **gone))


def test_untied_config_without_lm_head_says_how_to_tie() -> None:
    config = small_config()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .*; set tie_word_embeddings to"):
        check_tensors(config, available(config, **{LM_HEAD: None}))


@pytest.mark.parametrize(
    "name",
    ["score.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias"],
)
def test_tensor_that_the_config_does_not_call_for_is_refused(name: str) -> None:
    config = small_config()
    with pytest.raises(
        CheckpointError, match=rf"{name} \[4\] in model-00002.* is not part of the"
    ):
        check_tensors(config, available(config, **{name: (4,)}))


def test_stored_rotary_frequencies_are_harmless() -> None:
    config = small_config()
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    assert check_tensors(config, available(config, **dict.fromkeys(names, (4,)))) == names


def test_tied_checkpoint_may_hold_either_table() -> None:
    config = small_config(tie_word_embeddings=True)
    table = (config.vocab_size, config.hidden_size)
    both = available(config, **{LM_HEAD: table})
    head_only = available(config, **{LM_HEAD: table, EMBEDDING: None})
    neither = available(config, **{EMBEDDING: None})
    assert check_tensors(config, both) == ()
    assert check_tensors(config, head_only) == ()
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: expected"):
        check_tensors(config, neither)


def tying(config: ModelConfig, **tables: np.ndarray[Any, Any]) -> tuple[bool, str, str]:
    shapes = {name: table.shape for name, table in tables.items()}
    result = resolve_tying(config, available(config, **{EMBEDDING: None, **shapes}), tables.get)  # type: ignore[arg-type]
    return result.tied, result.embedding, result.lm_head


def test_tying_follows_what_the_tables_hold() -> None:
    tied, untied = small_config(tie_word_embeddings=True), small_config()
    table = np.random.default_rng(0).normal(size=(128, 32)).astype(np.float32)
    other = table.copy()
    other[-1, -1] += 1
    assert tying(tied, **{EMBEDDING: table}) == (True, EMBEDDING, EMBEDDING)
    assert tying(tied, **{LM_HEAD: table}) == (True, LM_HEAD, LM_HEAD)
    assert tying(tied, **{EMBEDDING: table, LM_HEAD: table.copy()}) == (True, EMBEDDING, EMBEDDING)
    assert tying(tied, **{EMBEDDING: table, LM_HEAD: other}) == (False, EMBEDDING, LM_HEAD)
    assert tying(untied, **{EMBEDDING: table, LM_HEAD: table}) == (False, EMBEDDING, LM_HEAD)


def test_tables_are_compared_by_value_across_types() -> None:
    config = small_config(tie_word_embeddings=True)
    half = np.random.default_rng(0).normal(size=(128, 32)).astype(ml_dtypes.bfloat16)
    wide = half.astype(np.float32)
    assert tying(config, **{EMBEDDING: half, LM_HEAD: wide}) == (True, EMBEDDING, EMBEDDING)
    wide[3, 3] *= 1.001
    assert tying(config, **{EMBEDDING: half, LM_HEAD: wide}) == (False, EMBEDDING, LM_HEAD)


def test_tables_that_differ_are_untied_by_transformers_too(
    copy_of: Callable[[str], Path],
) -> None:
    from safetensors.numpy import load_file, save_file

    folder = copy_of("qwen2_tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[LM_HEAD] = tensors[EMBEDDING] * 2
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert not open_checkpoint(folder).resolve_tying().tied
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not np.array_equal(
        model.lm_head.weight.detach().numpy(), model.model.embed_tokens.weight.detach().numpy()
    )
