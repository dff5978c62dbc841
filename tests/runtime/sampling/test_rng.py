"""The generators: torch's numbers one by one, and ours alone and in company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling import (
    DefaultGenerator,
    TokenGenerator,
    TorchGenerator,
    make_generator,
    sample,
    softmax,
)

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
RUNS: list[dict[str, Any]] = [
    case
    for case in json.loads((GOLDEN / "e2e.json").read_text())
    if case["seed"] is not None and case["assistant"] is None and "num_beams" not in case["kwargs"]
]
STEPS = np.load(GOLDEN / "e2e.npz")


def row(seed: int, size: int, *, removed: float = 0.0) -> Any:
    source = np.random.default_rng(seed)
    scores = (3 * source.standard_normal(size)).astype(np.float32)
    scores[source.random(size) < removed] = -np.inf
    scores[0] = 0
    return scores


@pytest.mark.parametrize(
    "case",
    [case for case in RUNS if f"e{case['idx']}_scores" in STEPS.files],
    ids=lambda case: case["name"],
)
def test_torch_generator_draws_the_recorded_tokens(case: dict[str, Any]) -> None:
    scores = STEPS[f"e{case['idx']}_scores"]
    generator = TorchGenerator(case["seed"])

    drawn = np.stack([sample(step, generator) for step in scores], axis=1)

    expected = np.array(case["sequences"])[:, -len(scores) :]
    ends = [126, 125] if case["model"] == "qwen2_instruct" else []
    for tokens, wanted in zip(drawn, expected, strict=True):
        end = next((i + 1 for i, token in enumerate(wanted) if token in ends), len(wanted))
        assert tokens[:end].tolist() == wanted[:end].tolist()


def test_recorded_runs_to_replay_are_not_lost() -> None:
    assert len(RUNS) == 15
    assert sum(f"e{case['idx']}_scores" in STEPS.files for case in RUNS) == 14


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 3000), st.lists(st.integers(0, 4), max_size=8))
def test_torch_generator_follows_torch_through_mixed_calls(
    seed: int, size: int, calls: list[int]
) -> None:
    probabilities = softmax(row(seed % 1000, size))
    weights = torch.from_numpy(probabilities)
    torch.manual_seed(seed)
    generator = TorchGenerator(seed)

    for call in calls:
        count = 1 + seed % size
        if call == 0:
            expected: Any = torch.multinomial(weights, 1).numpy()
            got: Any = [generator.choose(probabilities, None, size)]
        elif call == 1:
            expected = torch.multinomial(weights, min(count, 5)).numpy()
            got = generator.multinomial(probabilities, min(count, 5))
        elif call == 2:
            expected = torch.multinomial(weights, 7, replacement=True).numpy()
            got = generator.multinomial(probabilities, 7, replacement=True)
        elif call == 3:
            expected = torch.rand(count).numpy()
            got = generator.rand(count)
        else:
            torch.multinomial(weights, 1)
            generator.skip(size)
            continue
        np.testing.assert_array_equal(got, expected)


def test_torch_generator_draws_a_batch_as_torch_does() -> None:
    scores = np.stack([row(i, 500, removed=0.9) for i in range(4)])
    torch.manual_seed(11)
    expected = torch.multinomial(torch.from_numpy(softmax(scores)), 1)[:, 0].numpy()

    np.testing.assert_array_equal(sample(scores, TorchGenerator(11)), expected)


def test_torch_generator_uses_the_low_32_bits_of_the_seed() -> None:
    np.testing.assert_array_equal(TorchGenerator(2**32 + 5).rand(4), TorchGenerator(5).rand(4))


@pytest.mark.parametrize("generator", [DefaultGenerator, TorchGenerator])
@pytest.mark.parametrize("size", [5, 20_000])
def test_draws_follow_the_probabilities(generator: type[TokenGenerator], size: int) -> None:
    probabilities = np.zeros(size, np.float32)
    places = np.array([0, size // 2, size - 1])
    probabilities[places] = [0.5, 0.2, 0.3]
    source = generator(3)  # type: ignore[call-arg]

    drawn = [source.choose(probabilities, None, size) for _ in range(400)]

    shares = np.array([np.mean(np.array(drawn) == place) for place in places])
    assert shares.sum() == 1
    # Five standard deviations of 400 draws.
    np.testing.assert_allclose(shares, [0.5, 0.2, 0.3], atol=0.125)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(5000, 9000), st.floats(0, 0.999))
def test_default_generator_draws_the_same_from_few_and_from_all(
    seed: int, size: int, removed: float
) -> None:
    scores = row(seed % 997, size, removed=removed)
    survivors = np.flatnonzero(scores > -np.inf)
    probabilities = softmax(scores[survivors])
    alone = DefaultGenerator(seed)

    position = alone.choose(probabilities, survivors, size)

    assert sample(scores, DefaultGenerator(seed)).tolist() == [survivors[position]]


def test_default_generator_is_reproducible_and_its_streams_differ() -> None:
    first, again = DefaultGenerator(9), DefaultGenerator(9)
    other = DefaultGenerator(9, stream=1)

    numbers = first.rand(8)

    np.testing.assert_array_equal(numbers, again.rand(8))
    assert not np.array_equal(numbers, other.rand(8))
    assert DefaultGenerator().seed != DefaultGenerator().seed


def test_default_generator_draws_without_replacement_in_the_order_drawn() -> None:
    probabilities = np.array([0.7, 0.1, 0.1, 0.1], np.float32)
    generator = DefaultGenerator(1)

    draws = [generator.multinomial(probabilities, 3).tolist() for _ in range(300)]

    assert all(len(set(draw)) == 3 for draw in draws)
    # Five standard deviations of 300 draws.
    assert np.mean([draw[0] == 0 for draw in draws]) == pytest.approx(0.7, abs=0.14)
    assert len(generator.multinomial(probabilities, 9, replacement=True)) == 9


class Fixed(DefaultGenerator):
    """The default generator with a given uniform number in place of random ones."""

    def __init__(self, uniform: float) -> None:
        super().__init__(0)
        self._uniform = uniform
        self._random = self  # type: ignore[assignment]

    def random(self) -> float:
        return self._uniform


@pytest.mark.parametrize("size", [10, 8000])
def test_default_generator_inverts_the_distribution(size: int) -> None:
    probabilities = np.full(size, 2.0**-4, np.float32)

    positions = [Fixed((i + 0.5) / size).choose(probabilities, None, size) for i in range(size)]

    assert positions == list(range(size))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [3, 6000])
def test_largest_number_takes_the_last_possible_token(seed: int, size: int) -> None:
    probabilities = softmax(row(seed, size))
    probabilities[-2:] = 0

    assert Fixed(1 - 2**-53).choose(probabilities, None, size) == size - 3


def test_number_at_the_edge_of_a_block_never_takes_an_impossible_token() -> None:
    block = 512
    for seed in range(20):
        probabilities = softmax(4 * row(seed, 20 * block))  # sums of these do not fit float64
        probabilities[::block] = 0
        sums = np.add.reduceat(probabilities, np.arange(0, 20 * block, block), dtype=np.float64)
        ends = np.cumsum(sums)
        for end in ends:
            below = np.nextafter(end, 0) / ends[-1]

            position = Fixed(below).choose(probabilities, None, 20 * block)

            assert probabilities[position] > 0


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.0, "7"])
def test_seed_out_of_range_is_an_error(seed: Any) -> None:
    with pytest.raises(RequestError, match=r"seed must be an integer in \[0, 2\*\*64\)"):
        DefaultGenerator(seed)


def test_make_generator_knows_both_kinds_and_no_other() -> None:
    assert isinstance(make_generator("default", 1, stream=2), DefaultGenerator)
    assert isinstance(make_generator("torch", 1), TorchGenerator)
    with pytest.raises(RequestError, match=r'rng must be "default" or "torch"'):
        make_generator("cuda", 1)
    with pytest.raises(RequestError, match="with stream 1"):
        make_generator("torch", 1, stream=1)


@pytest.mark.parametrize("generator", [DefaultGenerator(0), TorchGenerator(0)])
def test_more_samples_than_candidates_is_an_error(generator: TokenGenerator) -> None:
    with pytest.raises(RequestError, match=r"num_samples must be at most .* 2, got 3"):
        generator.multinomial(np.array([0.5, 0.5], np.float32), 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_row_with_nan_or_inf_cannot_be_drawn_from(bad: float) -> None:
    scores = row(1, 40)
    scores[7] = bad

    with pytest.raises(RequestError, match=r"must not hold nan or \+inf"):
        sample(scores, DefaultGenerator(0))


def test_row_without_any_token_left_cannot_be_drawn_from() -> None:
    with pytest.raises(RequestError, match="at least one token must keep a score"):
        sample(np.full((2, 9), -np.inf, np.float32), DefaultGenerator(0))
