"""Which processors the settings give, with what arguments, in what order."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import generation_config, sampling
from qwen_runtime.errors import RequestError
from qwen_runtime.generation_config import (
    GenerationConfig,
    GenerationConfigWarning,
    ResolvedConfig,
    resolve,
)

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "processor_order.json").read_text())
# The attention mask is the engine's business, not that of the settings.
# A configuration together with keywords is a way to work here, not a deprecated one.
OTHERS = ("attention mask", "right-padding", "Passing `generation_config` together")
# Attributes of transformers' objects that ours do not have.
INNER = {"filter_value", "prepared_bias_variables", "batch_size", "top_n"}


@pytest.fixture(autouse=True)
def _every_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(generation_config, "MODES_NOT_HERE", {})
    return


def settings(**kwargs: Any) -> ResolvedConfig:
    given = {"max_new_tokens": 3, **kwargs}
    return resolve(None, GenerationConfig(), given, prompt_length=5, vocab_size=128)


def plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): str(v) if v == -np.inf else v for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def resolved(case: dict[str, Any]) -> ResolvedConfig:
    kwargs = {k: v for k, v in case["kwargs"].items() if k != "watermarking_config"}
    folder = GOLDEN / "models" / case["model"]
    argument = case.get("generation_config")
    return resolve(
        None if argument is None else GenerationConfig.from_dict(argument),
        GenerationConfig.from_file(folder / "generation_config.json"),
        kwargs,
        prompt_length=len((case["input"] or [[1]])[0]),
        vocab_size=128,
        max_position_embeddings=64,
    )


def test_max_length_within_the_prompt_is_an_error_as_recorded() -> None:
    case = next(case for case in CASES if case["name"] == "max_length_too_short")

    assert "`max_length` is set to 5" in case["error"]
    with pytest.raises(
        RequestError, match="max_length must be above the prompt's 5 tokens, got 5"
    ):
        resolved(case)


def test_missing_prompt_and_bos_token_leave_no_bos_token() -> None:
    case = next(case for case in CASES if case["name"] == "bos_missing")

    assert "`bos_token_id` has to be defined" in case["error"]
    assert resolved(case).bos_token_id is None


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["error"] is None], ids=lambda case: case["name"]
)
def test_settings_give_the_recorded_processors(case: dict[str, Any]) -> None:
    prompt = np.array(case["input"] or [[1]], dtype=np.int64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = resolved(case)
    custom: list[object] = []
    if case["name"] == "everything_custom":
        custom = [
            sampling.MinLengthLogitsProcessor(99, 3),
            sampling.TemperatureLogitsWarper(3.0),
        ]
    padded = next(
        (
            p[1]["prompt_ignore_length"]
            for p in case["result"]["processors"]
            if "prompt_ignore_length" in p[1]
        ),
        None,
    )
    expected = [p for p in case["result"]["processors"] if p[0] != "WatermarkLogitsProcessor"]
    with warnings.catch_warnings(record=True) as replaced:
        warnings.simplefilter("always")
        processors = sampling.build_logits_processors(
            config,
            prompt_ids=prompt,
            prompt_ignore_length=padded,
            custom=custom,
            prefix_allowed_tokens_fn=(
                (lambda batch, ids: [1])
                if any(p[0].startswith("Prefix") for p in expected)
                else None
            ),
            unconditional_logits=lambda ids: np.zeros((1, 128), np.float32),
        )

    assert [type(p).__name__ for p in processors] == [name for name, _ in expected]
    for processor, (name, attributes) in zip(processors, expected, strict=True):
        for attribute in attributes.keys() - INNER:
            got = plain(getattr(processor, attribute))
            expected_value = attributes[attribute]
            if isinstance(expected_value, float):
                expected_value = pytest.approx(expected_value)
            assert got == expected_value, (name, attribute)
    result = case["result"]
    assert config.max_length == result["config"]["max_length"]
    assert config.min_length == (result["config"]["min_length"] or 0)
    assert list(config.eos_token_ids) == (result["eos"] or [])
    assert config.pad_token_id == result["pad"]
    ours = [m for m in case["messages"] if not any(other in m for other in OTHERS)]
    if case["name"] == "gc_object_overrides":
        # transformers warns of the file's values only where a configuration is passed as well.
        ours = []
    unfeasible = [m for m in ours if "Unfeasible" in m]  # transformers says it twice
    assert len(caught) + len(replaced) == len(ours) - (len(unfeasible) == 2), ours


def test_presence_and_frequency_penalty_follow_the_repetition_penalty() -> None:
    config = settings(
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        no_repeat_ngram_size=2,
        sequence_bias={(1,): 1.0},
        logit_bias={3: -1},
    )

    names = [
        type(p).__name__
        for p in sampling.build_logits_processors(config, prompt_ids=np.ones((1, 5), np.int64))
    ]

    assert names == [
        "SequenceBiasLogitsProcessor",
        "LogitBiasLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "PresencePenaltyLogitsProcessor",
        "FrequencyPenaltyLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
    ]


def test_custom_processor_of_a_built_type_replaces_it_in_place_with_a_warning() -> None:
    custom = sampling.MinLengthLogitsProcessor(4, 3)
    config = settings(min_length=3, eos_token_id=3, no_repeat_ngram_size=2, suppress_tokens=[1])

    with pytest.warns(UserWarning, match="MinLengthLogitsProcessor replaces"):
        processors = sampling.build_logits_processors(
            config, prompt_ids=np.ones((1, 5), np.int64), custom=[custom]
        )

    assert processors[1] is custom
    assert len(processors) == 3


def test_custom_processors_come_before_the_warpers_and_are_not_replaced_by_subclass() -> None:
    class Mine(sampling.TopKLogitsWarper):
        pass

    def nothing(input_ids: Any, scores: Any) -> Any:
        return scores

    mine = Mine(3)
    config = settings(do_sample=True, top_k=5, suppress_tokens=[1])

    processors = sampling.build_logits_processors(
        config, prompt_ids=np.ones((1, 5), np.int64), custom=[nothing, mine]
    )

    assert processors[1:3] == [nothing, mine]
    assert type(processors[3]) is sampling.TopKLogitsWarper


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        (lambda input_ids, scores, state: scores, r"requires \['input_ids', 'scores', 'state'\]"),
        (3, "must hold callables"),
        (lambda scores: scores, "requires"),
    ],
)
def test_processor_that_cannot_be_called_with_two_arguments_is_refused(
    custom: object, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        sampling.build_logits_processors(
            settings(), prompt_ids=np.ones((1, 5), np.int64), custom=[custom]
        )


def test_processor_with_optional_parameters_is_accepted() -> None:
    def tilt(input_ids: Any, scores: Any, strength: float = 2.0) -> Any:
        return scores * np.float32(strength)

    processors = sampling.build_logits_processors(
        settings(), prompt_ids=np.ones((1, 5), np.int64), custom=[tilt]
    )

    assert processors(np.ones((1, 5), np.int64), np.ones((1, 4), np.float32)).tolist() == [
        [2.0] * 4
    ]


def test_custom_processor_that_writes_in_place_leaves_the_logits_alone() -> None:
    def ban(input_ids: Any, scores: Any) -> Any:
        scores[:, 0] = -np.inf
        return scores

    logits = np.ones((1, 4), np.float32)

    processed = sampling.LogitsProcessorList([ban])(np.ones((1, 2), np.int64), logits)

    assert np.isneginf(processed[0, 0])
    assert logits.tolist() == [[1.0] * 4]


@pytest.mark.parametrize("wrong", [None, np.ones(4, np.float32), [[1.0] * 4]])
def test_custom_processor_that_returns_something_else_is_an_error(wrong: Any) -> None:
    processors = sampling.LogitsProcessorList([lambda input_ids, scores: wrong])

    with pytest.raises(RequestError, match=r"must return scores of shape \[1, 4\]"):
        processors(np.ones((1, 2), np.int64), np.ones((1, 4), np.float32))


def test_custom_processor_may_return_float64() -> None:
    processors = sampling.LogitsProcessorList([lambda ids, scores: scores.astype(np.float64) / 3])

    assert processors(np.ones((1, 2), np.int64), np.ones((1, 4), np.float32)).dtype == np.float32


def test_guidance_without_unconditional_logits_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"guidance_scale=1\.5 needs the logits"):
        sampling.build_logits_processors(
            settings(guidance_scale=1.5), prompt_ids=np.ones((1, 5), np.int64)
        )


def test_value_inherited_from_the_file_warns_nobody() -> None:
    defaults = GenerationConfig(do_sample=True, temperature=0.7, top_k=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GenerationConfigWarning)
        config = resolve(
            None,
            defaults,
            {"do_sample": False, "max_new_tokens": 2},
            prompt_length=1,
            vocab_size=8,
        )
    assert sampling.build_warpers(config) == []


def test_all_lists_every_public_name_in_order() -> None:
    source = Path(sampling.__file__).read_text()
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and "sampling" in node.module
        for alias in node.names
    }

    assert set(sampling.__all__) == imported
    assert sampling.__all__ == sorted(sampling.__all__, key=lambda n: (n.islower(), n))
