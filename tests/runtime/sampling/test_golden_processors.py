"""Every recorded call of transformers' processors, repeated with ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import sampling

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "processors.json").read_text())
ARRAYS = np.load(GOLDEN / "processors.npz")
# Watermarks are out of scope; docs/generation.md says so.
REFUSED = {"WatermarkLogitsProcessor"}


def build(name: str, params: dict[str, Any]) -> Callable[..., Any]:
    if name == "CHAIN":
        return sampling.LogitsProcessorList([build(*link) for link in params["chain"]])
    params = dict(params)
    if "encoder_input_ids" in params:
        params["encoder_input_ids"] = np.array(params["encoder_input_ids"], dtype=np.int64)
    if "allowed_by_batch" in params:
        allowed = params.pop("allowed_by_batch")
        params["prefix_allowed_tokens_fn"] = lambda batch, ids: allowed[str(batch)]
    if "uncond" in params:
        logits = ARRAYS[params.pop("uncond")]
        params["unconditional_logits"] = lambda ids: logits[:, -1]
    return getattr(sampling, name)(**params)  # type: ignore[no-any-return]


def scores_of(case: dict[str, Any]) -> Any:
    key = case["scores"]
    return ARRAYS[key if key in ARRAYS.files else f"S_{key}"]


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case["cls"] not in REFUSED],
    ids=lambda case: f"{case['idx']}-{case['cls']}",
)
def test_processor_gives_the_recorded_scores(case: dict[str, Any]) -> None:
    scores = scores_of(case)
    expected = ARRAYS[f"p{case['idx']}_out"]
    ids = (
        ARRAYS[f"p{case['idx']}_ids"] if case["has_ids"] else np.zeros((len(scores), 1), np.int64)
    )
    before = scores.copy()

    got = build(case["cls"], case["params"])(ids, scores)

    np.testing.assert_array_equal(scores, before, err_msg="the input was modified")
    assert got.dtype == np.float32
    if case["rounding_critical"]:
        # A sum is compared with itself: rounding decides how many stay, not which values.
        stays = ~np.isneginf(got)
        np.testing.assert_array_equal(got[stays], scores[stays])
        assert (got.max(axis=1) == scores.max(axis=1)).all()
        return
    if case["tie_ambiguous"]:
        # Which of the equal scores stays is open in torch; how many and which values is not.
        got, expected = np.sort(got, axis=1), np.sort(expected, axis=1)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_only_watermarks_are_left_out_of_the_recorded_cases() -> None:
    left_out = [case["cls"] for case in CASES if case["cls"] in REFUSED]

    assert len(CASES) == 707
    assert left_out == ["WatermarkLogitsProcessor"] * 3
