"""Settings of a request: names, precedence, checks, warnings, and the table that lists them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from qwen_runtime import generation_config, generation_fields
from qwen_runtime.errors import BundleError, RequestError
from qwen_runtime.generation_config import (
    MODES_NOT_HERE,
    GenerationConfig,
    GenerationConfigWarning,
    ResolvedConfig,
    resolve,
)

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
VALIDATION: list[dict[str, Any]] = json.loads((GOLDEN / "validation.json").read_text())
FIELDS = {field.name for field in dataclasses.fields(GenerationConfig)}
# Where ours differs from the recorded outcome, and why.
DIFFERENT = {
    '{"unknown_field": 3}': "unknown names are errors here",
    '{"prompt_lookup_num_tokens": 3, "use_cache": false}': "the cache is always used",
    '{"cache_implementation": "static", "prompt_lookup_num_tokens": 2}': "there is one cache",
    '{"min_length": 3, "logits_processor": ["MinLengthLogitsProcessor(4, 3)"]}': (
        "processors are an argument of generate(); test_build.py replaces one"
    ),
}


@pytest.fixture
def every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_config, "MODES_NOT_HERE", {})


def settle(
    argument: GenerationConfig | None = None,
    defaults: GenerationConfig | None = None,
    /,
    *,
    prompt_length: int = 5,
    max_position_embeddings: int | None = 64,
    has_tokenizer: bool = False,
    **kwargs: Any,
) -> ResolvedConfig:
    return resolve(
        argument,
        defaults or GenerationConfig(),
        kwargs,
        prompt_length=prompt_length,
        vocab_size=128,
        max_position_embeddings=max_position_embeddings,
        has_tokenizer=has_tokenizer,
    )


def recorded_kwargs(case: dict[str, Any]) -> dict[str, Any]:
    kwargs = {k: v for k, v in case["kwargs"].items() if k != "batch"}
    if isinstance(kwargs.get("sequence_bias"), dict):
        kwargs["sequence_bias"] = {
            ast.literal_eval(key): bias for key, bias in kwargs["sequence_bias"].items()
        }
    return kwargs


@pytest.mark.usefixtures("every_mode")
@pytest.mark.parametrize(
    "case",
    [case for case in VALIDATION if json.dumps(case["kwargs"]) not in DIFFERENT],
    ids=lambda case: f"{case['where']}-{json.dumps(case['kwargs'])[:60]}",
)
def test_recorded_error_or_warning_has_an_equivalent(case: dict[str, Any]) -> None:
    kwargs = recorded_kwargs(case)
    base = GenerationConfig(max_new_tokens=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = None
        try:
            if case["where"] == "GenerationConfig":
                argument = GenerationConfig.from_dict({"max_new_tokens": 3, **kwargs})
                settle(argument)
            else:
                settle(None, base, **kwargs)
        except RequestError as raised:
            error = raised

    assert (error is None) == (case["error"] is None), error or case["error"]
    if error is not None:
        assert error.param in kwargs
        assert error.param in str(error)
    elif case["messages"]:
        assert [w.category for w in caught] == [GenerationConfigWarning]
        assert any(name in str(caught[0].message) for name in kwargs)
    else:
        assert not caught


@pytest.mark.usefixtures("every_mode")
def test_listed_differences_from_the_recorded_outcomes_are_real() -> None:
    recorded = {json.dumps(case["kwargs"]) for case in VALIDATION}

    assert DIFFERENT.keys() <= recorded
    with pytest.raises(RequestError, match="unknown setting 'unknown_field'"):
        GenerationConfig.from_dict({"unknown_field": 3})
    assert settle(prompt_lookup_num_tokens=3, use_cache=False, max_new_tokens=2)
    with pytest.warns(GenerationConfigWarning, match="cache_implementation has no effect"):
        settle(prompt_lookup_num_tokens=3, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(RequestError, match="logits_processor is not a generation setting"):
        settle(logits_processor=[])


def test_keyword_wins_over_argument_over_bundle_over_default() -> None:
    bundle = GenerationConfig(do_sample=True, top_k=20, top_p=0.8, temperature=0.7)
    argument = GenerationConfig(top_k=7, top_p=0.5, max_new_tokens=4)

    config = settle(argument, bundle, top_p=0.25)

    assert (config.top_p, config.top_k, config.temperature) == (0.25, 7, 0.7)
    assert config.typical_p == 1.0
    assert settle(do_sample=True, max_new_tokens=4).top_k == 50


def test_none_by_keyword_switches_off_and_none_in_a_configuration_inherits() -> None:
    bundle = GenerationConfig(
        do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.1, eos_token_id=3
    )

    inherited = settle(GenerationConfig(top_k=None, max_new_tokens=4), bundle)
    off = settle(
        None,
        bundle,
        top_k=None,
        top_p=None,
        repetition_penalty=None,
        eos_token_id=None,
        max_new_tokens=4,
    )

    assert (inherited.top_k, inherited.top_p) == (20, 0.8)
    assert (off.top_k, off.top_p, off.repetition_penalty, off.eos_token_ids) == (0, 1.0, 1.0, ())


def test_every_resolved_field_survives_none_by_keyword() -> None:
    nones = dict.fromkeys(FIELDS - {"max_new_tokens"})

    config = settle(
        None, GenerationConfig(max_length=50, temperature=0.5), **nones, max_new_tokens=4
    )

    assert config.max_length == 9
    assert config.temperature == 1.0
    assert config.rng == "default"


@pytest.mark.parametrize(
    ("limit", "prompt", "expected"), [(64, 5, 25), (None, 60, 80), (22, 5, 22)]
)
def test_without_a_length_twenty_tokens_follow_with_a_warning(
    limit: int | None, prompt: int, expected: int
) -> None:
    with pytest.warns(GenerationConfigWarning, match=f"max_length={expected}; set max_new_tokens"):
        config = settle(prompt_length=prompt, max_position_embeddings=limit)

    assert config.max_length == expected
    assert config.max_new_tokens == expected - prompt


def test_max_new_tokens_wins_over_max_length_with_a_warning() -> None:
    with pytest.warns(GenerationConfigWarning, match="max_new_tokens wins"):
        config = settle(max_length=30, max_new_tokens=3)

    assert config.max_length == 8


def test_given_length_is_not_capped_by_the_position_limit() -> None:
    assert settle(max_new_tokens=500).max_length == 505


def test_min_new_tokens_wins_over_min_length_with_a_warning() -> None:
    with pytest.warns(GenerationConfigWarning, match="min_new_tokens wins"):
        config = settle(min_length=30, min_new_tokens=3, max_new_tokens=9, eos_token_id=1)

    assert (config.min_length, config.min_new_tokens) == (8, 3)


def test_minimum_above_the_maximum_warns() -> None:
    with pytest.warns(GenerationConfigWarning, match="minimum length 35 .* maximum 11"):
        settle(min_new_tokens=30, max_new_tokens=6, eos_token_id=3)


def test_prompt_as_long_as_max_length_is_an_error() -> None:
    with pytest.raises(RequestError, match="above the prompt's 5 tokens, got 5; raise it"):
        settle(max_length=5)


def test_pad_token_defaults_to_the_first_end_token() -> None:
    config = settle(eos_token_id=[9, 4], max_new_tokens=2)

    assert (config.pad_token_id, config.explicit_pad_token_id) == (9, None)
    assert settle(eos_token_id=9, pad_token_id=0, max_new_tokens=2).pad_token_id == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "got 0.0; for greedy decoding set do_sample=False"),
        (0, "got 0; for greedy decoding"),
        (2, r"must be a finite float > 0, got 2; write 2\.0"),
        (-1.0, r"must be a finite float > 0, got -1\.0"),
        (float("nan"), "must be a finite number, got nan"),
        (float("inf"), "must be a finite number, got inf"),
        ("0.7", "must be a number, got '0.7'"),
        (True, "must be a number, got True"),
    ],
)
def test_temperature_that_is_no_positive_float_is_an_error(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        settle(do_sample=True, temperature=value, max_new_tokens=2)
    assert caught.value.param == "temperature"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", True),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", "5"),
        ("max_length", 0),
        ("min_new_tokens", -1),
        ("max_time", -1),
        ("max_time", float("nan")),
        ("do_sample", 1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop_strings", ""),
        ("eos_token_id", "x"),
        ("eos_token_id", [1.5]),
        ("pad_token_id", False),
        ("seed", -1),
        ("seed", 2**64),
        ("rng", "cuda"),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", [1]),
        ("top_logprobs", -1),
        ("suppress_tokens", 5),
        ("exponential_decay_length_penalty", (1,)),
        ("exponential_decay_length_penalty", (1.5, 2)),
        ("num_return_sequences", 0),
        ("response_format", "json"),
        ("assistant_ensemble_weight", 1.0),
        ("early_stopping", 1),
        ("sequence_bias", [[[1], float("nan")]]),
        ("sequence_bias", [[[], 1.0]]),
        ("bad_words_ids", [[]]),
        ("forced_bos_token_id", -1),
        ("num_assistant_tokens_schedule", "x"),
    ],
)
def test_value_of_a_wrong_type_is_an_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        GenerationConfig(**{name: value})
    assert caught.value.param == name


def test_range_of_a_sampling_setting_does_not_matter_in_greedy_decoding() -> None:
    config = settle(None, GenerationConfig(temperature=0, top_p=-1, top_k=-1), max_new_tokens=2)

    assert not config.do_sample


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forced_bos_token_id", 128),
        ("forced_eos_token_id", [1, 128]),
        ("bad_words_ids", [[128]]),
        ("sequence_bias", [[[1, 128], 1.0]]),
        ("logit_bias", {128: 1.0}),
    ],
)
def test_token_id_beyond_the_vocabulary_is_an_error(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"{name} must hold .* size 128, got \[128\]"):
        settle(**{name: value}, max_new_tokens=2)


def test_token_to_suppress_beyond_the_vocabulary_is_suppressed_already() -> None:
    assert settle(suppress_tokens=[-1, 500], max_new_tokens=2).suppress_tokens == (-1, 500)


def test_top_logprobs_needs_logprobs() -> None:
    with pytest.raises(RequestError, match="top_logprobs needs logprobs=True"):
        settle(top_logprobs=3, max_new_tokens=2)
    assert settle(top_logprobs=3, logprobs=True, max_new_tokens=2).needs_scores


def test_scores_are_needed_only_with_return_dict() -> None:
    assert settle(output_scores=True, return_dict_in_generate=True, max_new_tokens=2).needs_scores
    with pytest.warns(GenerationConfigWarning, match="output_scores have no effect"):
        assert not settle(output_scores=True, max_new_tokens=2).needs_scores


@pytest.mark.parametrize("name", ["stop", "stop_strings"])
def test_stop_strings_need_a_tokenizer(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} needs a tokenizer"):
        settle(**{name: "x"}, max_new_tokens=2)
    config = settle(**{name: "x"}, max_new_tokens=2, has_tokenizer=True)
    assert getattr(config, name) == ("x",)


def test_lists_become_tuples_and_numpy_scalars_become_python_numbers() -> None:
    config = GenerationConfig(
        eos_token_id=[1, np.int64(2)],  # type: ignore[list-item]
        top_k=np.int64(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        bad_words_ids=[[1], [2, 3]],
        logit_bias={"7": 1},  # type: ignore[dict-item]
    )

    assert config.eos_token_id == (1, 2)
    assert type(config.top_k) is int
    assert type(config.temperature) is float
    assert config.bad_words_ids == ((1,), (2, 3))
    assert config.logit_bias == ((7, 1.0),)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("max_new_token", "max_new_tokens"),
        ("max_tokens", "max_new_tokens"),
        ("n", "num_return_sequences"),
        ("topk", "top_k"),
        ("temprature", "temperature"),
    ],
)
def test_unknown_name_is_an_error_with_the_nearest_known_one(name: str, suggestion: str) -> None:
    with pytest.raises(
        RequestError, match=f"unknown setting '{name}'; did you mean '{suggestion}'"
    ):
        settle(**{name: 1})
    with pytest.raises(RequestError, match=f"did you mean '{suggestion}'"):
        GenerationConfig.from_dict({name: 1})


def test_name_like_no_other_points_to_the_table() -> None:
    with pytest.raises(RequestError, match=r"unknown setting 'zzzz'; docs/generation\.md"):
        settle(zzzz=1)


@pytest.mark.parametrize("name", sorted(generation_fields.OUT_OF_SCOPE))
def test_setting_out_of_scope_is_refused_with_what_to_do(name: str) -> None:
    reason = re.escape(generation_fields.OUT_OF_SCOPE[name])
    with pytest.raises(RequestError, match=f"{name} is not supported, got 7: {reason}") as caught:
        settle(**{name: 7}, max_new_tokens=2)
    assert caught.value.param == name
    neutral = generation_fields.OUT_OF_SCOPE_DEFAULTS.get(name, False)
    for value in (None, neutral):
        assert settle(**{name: value}, max_new_tokens=2)


@pytest.mark.parametrize("name", sorted(generation_fields.GENERATE_ARGUMENTS))
def test_argument_of_generate_is_no_setting(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is not a generation setting"):
        settle(**{name: 1})


@pytest.mark.parametrize("name", sorted(generation_fields.WITHOUT_EFFECT))
def test_irrelevant_setting_warns_once(name: str) -> None:
    value = "dynamic" if name == "cache_implementation" else 1
    with pytest.warns(GenerationConfigWarning, match=f"{name} has no effect") as caught:
        settle(**{name: value}, max_new_tokens=2)
    assert len(caught) == 1


def test_settings_that_give_the_same_tokens_are_accepted_in_silence() -> None:
    assert settle(use_cache=False, prefill_chunk_size=2, max_new_tokens=2)
    with pytest.raises(RequestError, match="use_cache must be true or false, got 'no'"):
        settle(use_cache="no", max_new_tokens=2)
    with pytest.raises(RequestError, match="cache_implementation must be one of"):
        settle(cache_implementation="nope", max_new_tokens=2)


@pytest.mark.parametrize("name", sorted(MODES_NOT_HERE))
def test_setting_of_a_mode_not_here_is_refused_by_name(name: str) -> None:
    values: dict[str, Any] = {
        "assistant_ensemble_weight": 0.5,
        "early_stopping": True,
        "num_assistant_tokens_schedule": "heuristic",
        "response_format": {"type": "json_object"},
        "assistant_confidence_threshold": 0.1,
    }
    with pytest.raises(RequestError, match=f"{name}=.* needs {MODES_NOT_HERE[name]}") as caught:
        settle(**{name: values.get(name, 3)}, max_new_tokens=2)
    assert caught.value.param == name
    default = generation_fields.DEFAULTS.get(name)
    assert settle(**{name: default}, max_new_tokens=2)


def test_companion_of_a_mode_in_the_bundle_does_no_harm_but_a_switch_does() -> None:
    assert settle(None, GenerationConfig(length_penalty=2.0), max_new_tokens=2)
    if "num_beams" in MODES_NOT_HERE:
        with pytest.raises(RequestError, match="num_beams=4 needs beam search"):
            settle(None, GenerationConfig(num_beams=4), max_new_tokens=2)
        assert settle(None, GenerationConfig(num_beams=4), num_beams=1, max_new_tokens=2)


def test_single_sequences_need_no_mode_that_is_missing() -> None:
    single = {"do_sample", "num_return_sequences", "top_k", "repetition_penalty", "stop", "seed"}

    assert not single & MODES_NOT_HERE.keys()
    assert MODES_NOT_HERE.keys() <= FIELDS


@pytest.mark.usefixtures("every_mode")
def test_prompt_lookup_warns_with_beams_and_refuses_several_answers() -> None:
    with pytest.warns(GenerationConfigWarning, match="no effect in beam search"):
        settle(prompt_lookup_num_tokens=3, num_beams=2, max_new_tokens=2)
    with pytest.raises(RequestError, match="must be 1 with prompt lookup, got 2"):
        settle(
            prompt_lookup_num_tokens=3, do_sample=True, num_return_sequences=2, max_new_tokens=2
        )


def test_file_is_read_with_transformers_leniency(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps(
            {
                "transformers_version": "4.37.0",
                "_from_model_config": True,
                "chat_format": "chatml",
                "output_attentions": False,
                "cache_implementation": "hybrid",
                "num_beam_groups": 1,
                "top_k": 20,
                "eos_token_id": [2, 1],
                "temperature": None,
            }
        )
    )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = GenerationConfig.from_file(path)

    assert config == GenerationConfig(top_k=20, eos_token_id=[2, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"penalty_alpha": 0.6}', "penalty_alpha is not supported, got 0.6"),
        ('{"top_k": "x"}', "top_k must be a number, got 'x'"),
        ('{"logits_processor": []}', "logits_processor is not a generation setting"),
        ("[1]", "expected a JSON object, got list"),
        ("{", "expected a readable JSON file"),
    ],
)
def test_file_that_cannot_be_honoured_is_an_error_with_its_path(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(text)

    with pytest.raises(BundleError, match=message) as caught:
        GenerationConfig.from_file(path)
    assert caught.value.path == path
    with pytest.raises(BundleError, match="expected a readable JSON file"):
        GenerationConfig.from_file(tmp_path / "absent.json")


def test_golden_files_agree_with_transformers() -> None:
    for path in sorted(GOLDEN.glob("models/*/generation_config.json")):
        theirs = transformers.GenerationConfig.from_pretrained(path.parent)
        ours = GenerationConfig.from_file(path)
        for name in FIELDS & vars(theirs).keys():
            value = getattr(theirs, name)
            assert getattr(ours, name) == (tuple(value) if isinstance(value, list) else value)


def test_defaults_are_those_of_transformers() -> None:
    theirs = transformers.GenerationConfig._get_default_generation_params()

    for name, value in theirs.items():
        if name in FIELDS:
            assert generation_fields.DEFAULTS.get(name) == value, name
        else:
            assert name in generation_fields.OUT_OF_SCOPE | generation_fields.IRRELEVANT, name


def table_rows() -> dict[str, str]:
    """Setting to status, from the tables of docs/generation.md."""
    text = (ROOT / "docs" / "generation.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\w ]+?) \|", text, flags=re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a setting is listed twice"
    return dict(rows)


def test_table_lists_every_argument_of_transformers() -> None:
    config = {n for n in vars(transformers.GenerationConfig()) if not n.startswith("_")}
    generate = inspect.signature(transformers.GenerationMixin.generate).parameters
    arguments = {n for n, p in generate.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}

    missing = (config | arguments) - table_rows().keys() - {"self", "transformers_version"}

    assert not missing


def test_table_agrees_with_the_code() -> None:
    rows = table_rows()
    by_status = {
        status: {name for name, listed in rows.items() if listed == status}
        for status in set(rows.values())
    }

    assert by_status.pop("rejected") == set(generation_fields.OUT_OF_SCOPE)
    assert by_status.pop("irrelevant") == set(generation_fields.IRRELEVANT)
    assert by_status.pop("argument") == set(generation_fields.GENERATE_ARGUMENTS)
    assert by_status.pop("not yet", set()) == set(MODES_NOT_HERE)
    ours = FIELDS - set(MODES_NOT_HERE) - set(vars(transformers.GenerationConfig()))
    assert by_status.pop("ours") == ours
    assert by_status.pop("supported") == FIELDS - set(MODES_NOT_HERE) - ours
    assert not by_status


def test_all_is_complete_and_sorted() -> None:
    assert set(generation_config.__all__) == {
        "MODES_NOT_HERE",
        "GenerationConfig",
        "GenerationConfigWarning",
        "ResolvedConfig",
        "resolve",
    }
