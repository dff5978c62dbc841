from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen3Config

from qwen_export.checkpoint import (
    CONFIG_KEYS,
    SUPPORTED_MODEL_TYPES,
    ModelConfig,
    require_supported,
)
from qwen_export.errors import CheckpointError, UnsupportedModelError

CLASSES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
GOLDEN = Path(__file__).parents[2] / "data/golden/models"
GOLDEN_NAMES = sorted(path.name for path in GOLDEN.iterdir())


def assert_same_as_transformers(raw: dict[str, Any]) -> None:
    ours = ModelConfig.from_dict(raw)
    copy = json.loads(json.dumps({k: v for k, v in raw.items() if k != "model_type"}))
    theirs = CLASSES[raw["model_type"]](**copy)
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "sliding_window",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    derived = theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == getattr(theirs, "head_dim", derived)
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype).split(".")[1])
    rope = dict(theirs.rope_parameters)
    rope.pop("type", None)
    assert ours.rope.rope_type == rope.pop("rope_type")
    assert ours.rope.rope_theta == rope.pop("rope_theta")
    assert dict(ours.rope.extra) == rope
    biased = raw["model_type"] == "qwen2" or theirs.attention_bias
    assert ours.qkv_bias == biased
    assert ours.output_bias == (raw["model_type"] == "qwen3" and theirs.attention_bias)
    assert ours.qk_norm == (raw["model_type"] == "qwen3")


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_config_reads_as_transformers_reads_it(name: str) -> None:
    assert_same_as_transformers(json.loads((GOLDEN / name / "config.json").read_text()))


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"rope_theta": 5.0},
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
        {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5.0, "rope_parameters": {}},
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        },
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": None, "rope_theta": 9},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "partial_rotary_factor": 0.5},
        {"num_key_value_heads": None, "num_attention_heads": 8},
        {"num_attention_heads": 64},
        {"hidden_size": 1000, "num_attention_heads": 32, "head_dim": 64},
        {"torch_dtype": "float16"},
        {"torch_dtype": "float16", "dtype": "bfloat16"},
        {"torch_dtype": "float16", "dtype": None},
        {"sliding_window": 16, "max_window_layers": 1},
        {"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": True},
        {"sliding_window": None, "max_window_layers": 1, "use_sliding_window": True},
        {"use_sliding_window": True, "num_hidden_layers": 30},
        {"num_hidden_layers": 2, "layer_types": ["attention", "full_attention"]},
        {"attention_bias": True},
        {"attention_bias": False, "tie_word_embeddings": True},
    ],
)
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_defaults_and_precedence_are_those_of_transformers(
    raw: dict[str, Any], model_type: str
) -> None:
    assert_same_as_transformers({"model_type": model_type, **raw})


ROPE = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.just("default"),
        "type": st.just("default"),
        "rope_theta": st.floats(1.0, 1e7),
    },
)


@given(
    raw=st.fixed_dictionaries(
        {"model_type": st.sampled_from(SUPPORTED_MODEL_TYPES)},
        optional={
            "hidden_size": st.sampled_from([128, 1024]),
            "num_hidden_layers": st.integers(1, 40),
            "num_attention_heads": st.sampled_from([32, 64]),
            "num_key_value_heads": st.sampled_from([None, 1, 2, 32]),
            "head_dim": st.sampled_from([2, 64]),
            "rms_norm_eps": st.floats(1e-8, 1e-3),
            "tie_word_embeddings": st.booleans(),
            "attention_bias": st.booleans(),
            "rope_theta": st.floats(1.0, 1e7),
            "rope_parameters": ROPE,
            "rope_scaling": ROPE,
            "use_sliding_window": st.booleans(),
            "sliding_window": st.none() | st.integers(1, 99),
            "max_window_layers": st.integers(0, 50),
            "layer_types": st.none(),
            "dtype": st.sampled_from([None, "float32"]),
            "torch_dtype": st.sampled_from([None, "bfloat16"]),
        },
    )
)
@settings(max_examples=150, deadline=None)
def test_any_config_reads_as_transformers_reads_it(raw: dict[str, Any]) -> None:
    assert_same_as_transformers(raw)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_every_golden_model_is_exportable(name: str) -> None:
    path = GOLDEN / name / "config.json"
    require_supported(ModelConfig.from_dict(json.loads(path.read_text()), path))


@pytest.mark.parametrize(
    ("raw", "key", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act", "hidden_act 'gelu' is not supported; 'silu' is"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "rope_scaling.type",
            "'longrope' is not supported; 'default', 'linear', 'dynamic', 'yarn', 'llama3' are",
        ),
        (
            {"rope_parameters": {"rope_type": "mrope"}},
            "rope_parameters.rope_type",
            r"rope_parameters\.rope_type 'mrope' is not supported",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor",
            r"partial_rotary_factor 0\.5 with rope_scaling\.type 'linear' is not supported",
        ),
    ],
)
def test_unsupported_feature_is_refused_by_key(
    raw: dict[str, Any], key: str, message: str
) -> None:
    config = ModelConfig.from_dict({"model_type": "qwen2", **raw}, "/models/x/config.json")
    with pytest.raises(UnsupportedModelError, match=message) as e:
        require_supported(config)
    assert e.value.key == key
    assert str(e.value).startswith("/models/x/config.json: ")


def test_wrong_value_of_a_rope_mapping_is_refused_before_the_export() -> None:
    raw = {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": -4.0}}
    config = ModelConfig.from_dict(raw, "/models/x/config.json")
    message = r"^/models/x/config\.json: rope_scaling\.factor must be finite and > 0, got -4\.0"
    with pytest.raises(CheckpointError, match=message):
        require_supported(config)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "ignored"),
    [
        ({"rope_type": "default", "factor": 4.0}, ["factor"]),
        ({"rope_type": "default", "factor": None}, []),
        ({"rope_type": "linear", "factor": 4.0, "beta_fast": 32}, ["beta_fast"]),
        (
            {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
            ["original_max_position_embeddings"],
        ),
        (YARN | {"truncate": False, "beta_slow": 1, "finetuned": True}, ["finetuned"]),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, []),
        (YARN | {"mscale": 1.0}, ["mscale"]),
        (
            YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0},
            ["mscale", "mscale_all_dim"],
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "attention_factor": 1.0,
            },
            ["attention_factor"],
        ),
    ],
)
def test_rope_keys_without_effect_are_listed(
    rope: dict[str, Any], ignored: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = ModelConfig.from_dict({"model_type": "qwen2", "rope_parameters": rope})
    assert config.ignored_keys == tuple(f"rope_parameters.{key}" for key in ignored)
    assert ("ignored unknown keys" in caplog.text) == bool(ignored)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "llama"}, "config.json: model_type 'llama' is not supported; qwen2 and"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' is not supported"),
        ({"num_experts": 8}, "num_experts is set, but mixture-of-experts models are not"),
        ({"vision_config": {}}, "vision_config is set, but models with parts beside the text"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is set, but only decoders are"),
        ({"layer_types": ["linear_attention"] * 32}, "layer_types holds 'linear_attention'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters differs by layer type",
        ),
    ],
)
def test_another_kind_of_model_is_refused_when_read(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ModelConfig.from_dict({"model_type": "qwen2", **raw})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"hidden_size": "896"}, "hidden_size must be an integer >= 1, got '896'"),
        ({"hidden_size": True}, "hidden_size must be an integer >= 1, got True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer >= 1, got 0"),
        ({"vocab_size": None}, "vocab_size must be an integer >= 1, got None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite and >= 0, got nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, got '1e-6'"),
        ({"rope_theta": None}, "rope_theta must be a number, got None"),
        ({"rope_scaling": {"rope_theta": 0}}, "rope_scaling.rope_theta must be finite and > 0"),
        ({"rope_scaling": {"type": 3}}, "rope_scaling.type must be a string, got 3"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null, got 'yarn'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"num_key_value_heads": 5}, "num_key_value_heads must divide num_attention_heads = 32"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"head_dim": None}, "head_dim must be an integer >= 1, got None"),
        ({"dtype": "float64"}, "dtype must be one of bfloat16, float16, float32, or null"),
        ({"torch_dtype": "auto"}, "torch_dtype must be one of bfloat16"),
        ({"layer_types": "full_attention"}, "layer_types must be a list or null"),
        ({"layer_types": ["full_attention"]}, "must have num_hidden_layers = 32 entries, got 1"),
        ({"layer_types": ["sliding_attention"] * 32}, "needs use_sliding_window true"),
        ({"eos_token_id": ["2"]}, r"eos_token_id must be a token id, a list .* got \['2'\]"),
        ({"hidden_act": None}, "hidden_act must be a string, got None"),
    ],
)
def test_wrong_value_names_key_file_and_value(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as e:
        ModelConfig.from_dict({"model_type": "qwen2", **raw}, "/models/x/config.json")
    assert str(e.value).startswith("/models/x/config.json: ")
    assert e.value.path == Path("/models/x/config.json")


def test_missing_model_type_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="model_type is missing"):
        ModelConfig.from_dict({"hidden_size": 64})


def test_unknown_keys_are_listed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    raw = {
        "model_type": "qwen2",
        "use_mrope": False,
        "architectures": ["Qwen2ForCausalLM"],
        "logit_softcap": 30.0,
        "asked_nothing": None,
        "rope_scaling": {"type": "default", "mrope_section": [1, 2]},
    }
    with caplog.at_level(logging.WARNING):
        config = ModelConfig.from_dict(raw)
    assert config.ignored_keys == ("logit_softcap", "rope_scaling.mrope_section")
    assert "ignored unknown keys: logit_softcap, rope_scaling.mrope_section" in caplog.text


def test_known_keys_are_not_reported_as_ignored(caplog: pytest.LogCaptureFixture) -> None:
    for name in GOLDEN_NAMES:
        raw = json.loads((GOLDEN / name / "config.json").read_text())
        assert ModelConfig.from_dict(raw).ignored_keys == ()
    assert caplog.text == ""


def test_token_ids_of_the_config_are_kept() -> None:
    raw = {"model_type": "qwen2", "eos_token_id": [1, 2], "bos_token_id": 3, "pad_token_id": None}
    config = ModelConfig.from_dict(raw)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ((1, 2), 3, None)


def test_config_becomes_a_dictionary() -> None:
    config = ModelConfig.from_dict({"model_type": "qwen3"})
    assert dataclasses.asdict(config)["rope"]["rope_theta"] == 10000.0


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_every_field_of_transformers_is_in_the_table(model_type: str) -> None:
    config_class = CLASSES[model_type]
    known = {key.name for key in CONFIG_KEYS if model_type in key.model_types}
    fields = {field.name for field in dataclasses.fields(config_class)}
    written = set(config_class().to_dict())
    assert (fields | written) - known == set()


def test_table_names_each_key_once_for_each_model_type() -> None:
    pairs = [(key.name, kind) for key in CONFIG_KEYS for kind in key.model_types]
    assert len(pairs) == len(set(pairs))


def test_documentation_has_exactly_the_rows_of_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs/config.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0].strip(): part for part in page.split("\n### ")[1:]}
    for status in ("honoured", "refused", "irrelevant"):
        rows = [line for line in sections[status.capitalize()].splitlines() if "| `" in line]
        assert rows == [
            f"| `{key.name}` | {', '.join(key.model_types)} | {key.note} |"
            for key in CONFIG_KEYS
            if key.status == status
        ]
