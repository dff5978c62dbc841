"""Recorded runs of transformers' generate(), replayed: same ids, same scores."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import LLM, CapacityError, GenerationConfig, RequestError
from qwen_runtime.generation_config import GenerationConfigWarning

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "e2e.json").read_text("utf-8"))
TEXT_CASES: list[dict[str, Any]] = json.loads((GOLDEN / "text_e2e.json").read_text("utf-8"))
VALIDATION: list[dict[str, Any]] = json.loads((GOLDEN / "validation.json").read_text("utf-8"))
# Modes with tests of their own, and one setting that is refused.
OTHER_MODES = {
    "beam search": lambda case: case["kwargs"].get("num_beams", 1) > 1,
    "assisted generation": lambda case: case["assistant"] is not None,
    "prompt lookup": lambda case: "prompt_lookup_num_tokens" in case["kwargs"],
    "guidance": lambda case: "guidance_scale" in case["kwargs"],
    "watermarks": lambda case: "watermarking_config" in case["kwargs"],
}
# Second words of the golden models' names that the exporter may refuse.
_SCALED_OR_SLIDING = {"sliding", "layer", "yarn", "linear", "dynamic", "llama3"}
SCORE_TOLERANCE = 1e-3  # relative; the recording's own rounding differs by up to 2e-4


def mode_of(case: dict[str, Any]) -> str:
    return next((mode for mode, holds in OTHER_MODES.items() if holds(case)), "rows")


ROWS = [case for case in CASES if mode_of(case) == "rows"]
# "dynamic" rotary embeddings end at max_position_embeddings, 12 tokens here.
TOO_LONG = [
    case for case in ROWS if case["model"] == "qwen2_dynamic" and len(case["sequences"][0]) > 12
]
RUN = [case for case in ROWS if case not in TOO_LONG]


@pytest.fixture(scope="module")
def recorded() -> Iterator[Any]:
    with np.load(GOLDEN / "e2e.npz") as arrays:
        yield arrays


@pytest.fixture(autouse=True)
def recorded_settings_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GenerationConfigWarning)
        yield


def arguments_of(case: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(case["kwargs"])
    if case["seed"] is not None:
        arguments |= {"seed": case["seed"], "rng": "torch"}
    if case["prefix_fn"] == "allow_mod3":
        arguments["prefix_allowed_tokens_fn"] = lambda row, ids: [
            token for token in range(128) if token % 3 == (len(ids) + row) % 3
        ]
    return arguments


def assert_scores_equal(ours: Any, expected: np.ndarray, what: str) -> None:
    ours = np.stack(ours)
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(expected), err_msg=what)
    finite = ~np.isneginf(expected)
    scale = np.abs(expected[finite]).max()
    assert np.abs(ours[finite] - expected[finite]).max() <= SCORE_TOLERANCE * scale, what


def test_no_recorded_run_is_left_out_unnoticed() -> None:
    modes = Counter(mode_of(case) for case in CASES)

    assert modes == {
        "rows": 83,
        "beam search": 56,
        "assisted generation": 16,
        "prompt lookup": 2,
        "guidance": 2,
        "watermarks": 1,
    }
    assert (len(RUN), len(TOO_LONG)) == (81, 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", TOO_LONG, ids=lambda case: case["name"])
def test_recorded_run_past_the_limit_of_dynamic_rope_is_refused(
    case: dict[str, Any], golden_llm: Callable[[str], LLM]
) -> None:
    with pytest.raises(CapacityError, match="must fit into 12 tokens"):
        golden_llm(case["model"]).generate(
            input_ids=case["input_ids"], attention_mask=case["attention_mask"], **case["kwargs"]
        )


@pytest.mark.parametrize(
    "case",
    [
        # Each further model costs the build of its bundle.
        pytest.param(
            case,
            id=case["name"],
            marks=[] if case["model"] == "qwen2_untied" else [pytest.mark.slow],
        )
        for case in RUN
    ],
)
def test_recorded_run_is_reproduced(
    case: dict[str, Any], golden_llm: Callable[[str], LLM], recorded: Any
) -> None:
    llm, arguments = golden_llm(case["model"]), arguments_of(case)
    if case["input_ids"] is None:
        output = llm.generate(None, **arguments)
        assert [output.prompt_token_ids + output.token_ids] == case["sequences"]
        return

    batch = {"input_ids": case["input_ids"], "attention_mask": case["attention_mask"]}
    plain = llm.generate(**batch, **arguments)
    full = llm.generate(
        **batch,
        **arguments,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )

    assert plain.sequences.dtype == np.int64
    assert plain.sequences.tolist() == case["sequences"]
    assert plain.scores is None
    assert plain.logits is None
    assert full.sequences.tolist() == case["sequences"]
    assert len(full.scores) == len(full.logits) == len(case["sequences"][0]) - full_length(case)
    for kind in ("scores", "logits"):
        key = f"e{case['idx']}_{kind}"
        if key in recorded:
            assert_scores_equal(getattr(full, kind), recorded[key], kind)


def full_length(case: dict[str, Any]) -> int:
    return len(case["input_ids"][0])


def test_recorded_scores_are_compared_for_most_runs(recorded: Any) -> None:
    compared = [case for case in RUN if f"e{case['idx']}_scores" in recorded]

    assert len(compared) >= 30
    scores = recorded[f"e{compared[0]['idx']}_scores"]
    with pytest.raises(AssertionError, match="scores"):
        assert_scores_equal(scores * np.float32(1.01), scores, "scores")


def test_recorded_watermark_is_refused_by_name(golden_llm: Callable[[str], LLM]) -> None:
    case = next(case for case in CASES if mode_of(case) == "watermarks")

    with pytest.raises(RequestError, match="watermarking_config is not supported"):
        golden_llm(case["model"]).generate(input_ids=case["input_ids"], **case["kwargs"])


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case["name"])
def test_recorded_run_with_stop_strings_is_reproduced(case: dict[str, Any], text_llm: LLM) -> None:
    arguments = dict(case["kwargs"])
    if case["eos_removed"]:
        arguments["eos_token_id"] = None

    output = text_llm.generate(
        input_ids=case["input_ids"], attention_mask=case["attention_mask"], **arguments
    )

    assert output.sequences.tolist() == case["sequences"]


GENERATE_ERRORS = [
    case
    for case in VALIDATION
    if case["where"] == "generate"
    and not case["kwargs"].keys()
    & {
        "num_beams",
        "prompt_lookup_num_tokens",
        "guidance_scale",
        "assistant_model",
        "logits_processor",
        "streamer",
        "batch",
    }
]


def test_recorded_generate_calls_are_counted() -> None:
    assert len(GENERATE_ERRORS) == 38


@pytest.mark.parametrize("case", GENERATE_ERRORS, ids=lambda case: json.dumps(case["kwargs"])[:60])
def test_recorded_error_of_generate_is_an_error_here_and_nothing_else_is(
    case: dict[str, Any], tiny_llm: LLM
) -> None:
    arguments = dict(case["kwargs"])
    bias = arguments.get("sequence_bias")
    if isinstance(bias, dict):
        arguments["sequence_bias"] = {(5,): bias["(5,)"]}
    arguments.setdefault("max_new_tokens", 2)
    name = next(iter(k for k in case["kwargs"] if k != "do_sample"))

    if case["error"]:
        with pytest.raises(RequestError, match=name):
            tiny_llm.generate(input_ids=[[5, 17, 99]], **arguments)
    else:
        assert tiny_llm.generate(input_ids=[[5, 17, 99]], **arguments).sequences.shape == (1, 5)


def test_generation_config_object_and_keywords_reproduce_the_same_run(tiny_llm: LLM) -> None:
    case = next(case for case in RUN if case["name"] == "greedy_combo")

    output = tiny_llm.generate(
        input_ids=case["input_ids"], generation_config=GenerationConfig(**case["kwargs"])
    )

    assert output.sequences.tolist() == case["sequences"]
