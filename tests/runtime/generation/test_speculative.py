"""The rule that accepts drawn candidates, and how many are drafted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime.generation.candidates import DraftLength, accept_drawn
from qwen_runtime.sampling import DefaultGenerator, TorchGenerator, softmax

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
SPECULATIVE: list[dict[str, Any]] = json.loads((GOLDEN / "speculative.json").read_text("utf-8"))[
    "speculative"
]


def test_recorded_acceptances_are_counted() -> None:
    assert len(SPECULATIVE) == 12
    assert sum(case["ensemble_weight"] is not None for case in SPECULATIVE) == 2


@pytest.mark.parametrize("case", SPECULATIVE, ids=lambda case: f"seed-{case['seed']}")
def test_recorded_acceptance_is_reproduced(case: dict[str, Any]) -> None:
    with np.load(GOLDEN / "speculative.npz") as arrays:
        name = f"s{case['idx']}"
        candidates = arrays[f"{name}_cand"][0].tolist()
        drafted, target = softmax(arrays[f"{name}_q"][0]), softmax(arrays[f"{name}_p"][0])

    block = accept_drawn(
        candidates,
        list(drafted),
        lambda position: target[position],
        TorchGenerator(case["seed"]),
        case["ensemble_weight"],
    )

    assert [block] == case["valid_tokens"]
    assert len(block) - 1 == case["n_matches"]


def test_accepted_tokens_follow_the_distribution_of_the_model() -> None:
    generator = DefaultGenerator(0)
    drafts = softmax(np.array([2, 1, 0, -1, 0.5], np.float32))
    model = softmax(np.array([0, 1, 2, -3, 0.5], np.float32))
    counts: Counter[int] = Counter()
    for _ in range(20_000):
        candidate = generator.choose(drafts, None, 5)
        counts[accept_drawn([candidate], [drafts], lambda _: model, generator)[0]] += 1

    observed = np.array([counts[token] for token in range(5)]) / 20_000
    np.testing.assert_allclose(observed, model, atol=0.012)
    assert np.abs(observed - drafts).max() > 0.1


def test_equal_distributions_leave_something_to_draw_from() -> None:
    same = np.array([0.5, 0.5, 0], np.float32)
    almost = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0], np.float32)

    for seed in range(50):
        block = accept_drawn([1], [almost], lambda _: same, DefaultGenerator(seed))
        assert set(block) <= {0, 1}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [4, 4, 4]), ("heuristic", [6, 5, 4]), ("heuristic_transient", [6, 5, 4])],
)
def test_draft_length_follows_its_schedule(schedule: str, expected: list[int]) -> None:
    length, seen = DraftLength(4, schedule), []
    for accepted in (True, False, False):
        length.update(all_accepted=accepted)
        seen.append(length.value)
    assert seen == expected

    for _ in range(9):
        length.update(all_accepted=False)
    assert length.value == (4 if schedule == "constant" else 1)
