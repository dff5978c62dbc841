"""Rotary tables: bit-equal to transformers' in every rope type, and how long they may be."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen_export.checkpoint import ModelConfig
from qwen_export.errors import CheckpointError, UnsupportedModelError
from qwen_export.rotary import context_limit, inverse_frequencies, rotary_tables

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
RECORDED: list[dict[str, Any]] = json.loads((GOLDEN / "rope.json").read_text())
# The one recorded past max_position_embeddings, where "dynamic" depends on the row.
FIXED = [case for case in RECORDED if case["seq_len"] is None]
TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def config_json(rope: dict[str, Any], head_dim: int, positions: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": 2 * head_dim,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "rope_parameters": rope,
    }


def recorded_config(case: dict[str, Any]) -> dict[str, Any]:
    return config_json(
        case["rope_parameters_in"], case["head_dim"], case["max_position_embeddings"]
    )


def transformers_rotary(raw: dict[str, Any]) -> Qwen2RotaryEmbedding:
    copy = json.loads(json.dumps(raw))
    del copy["model_type"]
    return Qwen2RotaryEmbedding(Qwen2Config(**copy))


def assert_equals_transformers(raw: dict[str, Any], length: int) -> None:
    config = ModelConfig.from_dict(raw)
    theirs = transformers_rotary(raw)
    frequencies, factor = inverse_frequencies(config)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling
    cos, sin = rotary_tables(config, length)
    assert cos.dtype == sin.dtype == np.float32
    tables = theirs(torch.zeros(1), torch.arange(length)[None])
    for ours, their in zip((cos, sin), tables, strict=True):
        half = config.head_dim // 2
        assert np.array_equal(ours, their[0, :, :half].numpy())
        assert np.array_equal(ours, their[0, :, half:].numpy())


def test_recorded_configurations_cover_every_type() -> None:
    assert {case["rope_parameters_in"]["rope_type"] for case in FIXED} == set(TYPES)
    assert len(FIXED) == len(RECORDED) - 1


@pytest.mark.parametrize("case", FIXED, ids=lambda case: str(case["idx"]))
def test_tables_have_the_bits_of_transformers(case: dict[str, Any]) -> None:
    dynamic = case["rope_parameters_in"]["rope_type"] == "dynamic"
    assert_equals_transformers(recorded_config(case), 2048 if dynamic else 5000)


@pytest.mark.parametrize("case", FIXED, ids=lambda case: str(case["idx"]))
def test_tables_agree_with_the_recorded_ones(case: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(recorded_config(case))
    frequencies, factor = inverse_frequencies(config)
    dynamic = config.rope.rope_type == "dynamic"
    positions = [p for p in case["positions"] if p < 2048 or not dynamic]
    cos, sin = rotary_tables(config, positions[-1] + 1)
    half = config.head_dim // 2
    with np.load(GOLDEN / "rope.npz") as recorded:
        # The last bit of a power is the machine's; at position 131,071 it is 1e-7 x 131,071 rad
        # of the fastest pairs that have it.
        np.testing.assert_allclose(frequencies, recorded[f"r{case['idx']}_inv_freq"], rtol=1.3e-7)
        for table, name in ((cos, "cos"), (sin, "sin")):
            expected = recorded[f"r{case['idx']}_{name}"][: len(positions), :half]
            np.testing.assert_allclose(table[positions], expected, atol=1e-5)
    assert factor == case["attention_scaling"]


@pytest.mark.parametrize("rope_type", [name for name in TYPES if name != "default"])
def test_each_scaling_differs_from_plain_rope(rope_type: str) -> None:
    case = next(c for c in FIXED if c["rope_parameters_in"]["rope_type"] == rope_type)
    raw = recorded_config(case)
    plain = {"rope_type": "default", "rope_theta": raw["rope_parameters"]["rope_theta"]}
    cos, _ = rotary_tables(ModelConfig.from_dict(raw), 2048)
    unscaled, _ = rotary_tables(ModelConfig.from_dict(raw | {"rope_parameters": plain}), 2048)
    # "dynamic" scales only past max_position_embeddings.
    assert (np.abs(cos - unscaled).max() > 0.1) == (rope_type != "dynamic")


number = st.floats(0.5, 64.0)
SCALED = st.one_of(
    st.fixed_dictionaries({"rope_type": st.sampled_from(["linear", "dynamic"]), "factor": number}),
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": st.none() | number},
        optional={
            "original_max_position_embeddings": st.integers(1, 512),
            "attention_factor": st.none() | st.floats(0.1, 2.0),
            "beta_fast": st.none() | number,
            "beta_slow": st.none() | number,
            "mscale": st.none() | st.just(0) | st.floats(0.1, 2.0),
            "mscale_all_dim": st.none() | st.just(0) | st.floats(0.1, 2.0),
            "truncate": st.booleans(),
        },
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": number,
            "low_freq_factor": st.floats(0.5, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
        },
        optional={"original_max_position_embeddings": st.integers(1, 512)},
    ),
)


@given(
    rope=SCALED,
    theta=st.sampled_from([10_000, 1e6, 500_000.0, 33.3]),
    half_dim=st.integers(2, 40),
)
@settings(max_examples=150, deadline=None)
def test_any_scaling_has_the_bits_of_transformers(
    rope: dict[str, Any], theta: float, half_dim: int
) -> None:
    raw = config_json(rope | {"rope_theta": theta}, 2 * half_dim, 512)
    assert_equals_transformers(raw, 40)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "linear"}, r"rope_parameters\.factor must be a number, got None"),
        ({"rope_type": "linear", "factor": None}, "factor must be a number, got None"),
        ({"rope_type": "yarn"}, r"rope_parameters\.factor must be a number, got None"),
        ({"rope_type": "yarn", "factor": "4"}, "factor must be a number, got '4'"),
        ({"rope_type": "yarn", "factor": True}, "factor must be a number, got True"),
        ({"rope_type": "dynamic", "factor": float("nan")}, "factor must be finite and > 0"),
        ({"rope_type": "dynamic", "factor": 0}, "factor must be finite and > 0, got 0"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}, "beta_fast must be finite"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": "no"}, "truncate must be true or false"),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": float("inf")}, "mscale must be finite"),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}, "rope_theta must not be 1"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1.5},
            "original_max_position_embeddings must be an integer >= 1, got 1.5",
        ),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor must be a number, got None"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
            },
            "high_freq_factor must be above low_freq_factor = 4, got 4.0",
        ),
    ],
)
def test_wrong_value_of_a_rope_mapping_names_its_key(rope: dict[str, Any], message: str) -> None:
    config = ModelConfig.from_dict(config_json(rope, 8, 64))
    with pytest.raises(CheckpointError, match=message):
        rotary_tables(config, 4)


def test_part_of_a_head_is_refused_and_the_whole_is_not() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    partly = config_json(rope | {"partial_rotary_factor": 0.5}, 8, 64)
    with pytest.raises(UnsupportedModelError, match=r"partial_rotary_factor 0\.5 with") as e:
        rotary_tables(ModelConfig.from_dict(partly), 4)
    assert e.value.key == "partial_rotary_factor"
    assert_equals_transformers(config_json(rope | {"partial_rotary_factor": 1.0}, 8, 64), 4)


def test_dynamic_scaling_of_heads_of_two_is_refused() -> None:
    config = ModelConfig.from_dict(config_json({"rope_type": "dynamic", "factor": 2.0}, 2, 64))
    with pytest.raises(UnsupportedModelError, match="needs a head_dim above 2, got 2"):
        rotary_tables(config, 4)


# --- the context --------------------------------------------------------------------------------


def model(rope_type: str) -> ModelConfig:
    factor = {} if rope_type == "default" else {"factor": 2.0}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    return ModelConfig.from_dict(config_json({"rope_type": rope_type, **factor, **llama3}, 8, 64))


@pytest.mark.parametrize("rope_type", TYPES)
def test_context_up_to_max_position_embeddings_is_taken_as_it_is(rope_type: str) -> None:
    assert context_limit(model(rope_type), None) == 64
    assert context_limit(model(rope_type), 64) == 64
    assert context_limit(model(rope_type), 1) == 1


@pytest.mark.parametrize("rope_type", [name for name in TYPES if name != "dynamic"])
def test_longer_context_is_a_warning_and_the_angles_go_on(rope_type: str) -> None:
    with pytest.warns(UserWarning, match="--max-context 100 is more than the max_position_embe"):
        assert context_limit(model(rope_type), 100) == 100
    short, _ = rotary_tables(model(rope_type), 64)
    longer, _ = rotary_tables(model(rope_type), 100)
    assert np.array_equal(longer[:64], short)


def test_longer_context_of_dynamic_rope_is_refused() -> None:
    message = "--max-context must be at most max_position_embeddings = 64 for rope type 'dynamic'"
    for refused in (context_limit, rotary_tables):
        with warnings.catch_warnings(), pytest.raises(UnsupportedModelError, match=message) as e:
            refused(model("dynamic"), 65)
        assert e.value.key == "max_context"


def test_dynamic_rope_past_its_length_is_another_table() -> None:
    """Why it is refused: transformers rotates by the longest row so far."""
    case = next(case for case in RECORDED if case["seq_len"] is not None)
    frequencies, _ = inverse_frequencies(ModelConfig.from_dict(recorded_config(case)))
    with np.load(GOLDEN / "rope.npz") as recorded:
        past = recorded[f"r{case['idx']}_inv_freq"]
    assert np.abs(frequencies.numpy() - past).max() > 1e-3
