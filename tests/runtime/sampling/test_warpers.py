"""Cuts of the warpers where rounding, ties or size decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qwen_runtime import sampling
from qwen_runtime.errors import RequestError

IDS = np.zeros((1, 1), np.int64)


def kept(processor: sampling.LogitsProcessor, scores: Any) -> list[int]:
    return np.flatnonzero(processor(IDS, np.array([scores], np.float32))[0] > -np.inf).tolist()


def test_top_p_removes_a_token_exactly_at_the_mass_and_keeps_the_lower_id_of_a_tie() -> None:
    assert kept(sampling.TopPLogitsWarper(0.5), [0, 0, 0, 0]) == [0, 1]


def test_top_p_keeps_one_token_when_p_is_zero() -> None:
    assert kept(sampling.TopPLogitsWarper(0.0), [1, 3, 3, 2]) == [1]


def test_top_p_keeps_the_tokens_it_is_told_to() -> None:
    assert kept(sampling.TopPLogitsWarper(0.1, min_tokens_to_keep=3), [9, 1, 0, 2]) == [0, 1, 3]


@pytest.mark.parametrize(("top_p", "low_kept"), [(0.5, 546), (0.46, 110), (0.44, 0)])
def test_top_p_of_a_large_row_cuts_inside_a_group_of_improbable_tokens(
    top_p: float, low_kept: int
) -> None:
    # 6,000 tokens hold 0.55 of the mass and 100 hold 0.45: the cut falls among the former.
    scores = np.log(np.repeat([0.55 / 6000, 0.45 / 100], [6000, 100])).astype(np.float32)

    stays = np.array(kept(sampling.TopPLogitsWarper(top_p), scores))

    # A rounding error of the sums is worth less than one token.
    assert np.count_nonzero(stays < 6000) == pytest.approx(low_kept, abs=1)
    assert np.count_nonzero(stays >= 6000) == (100 if top_p > 0.45 else 98)


def test_top_k_keeps_every_token_tied_with_the_last() -> None:
    assert kept(sampling.TopKLogitsWarper(2), [1, 3, 2, 2, 0]) == [1, 2, 3]


def test_top_k_above_the_vocabulary_keeps_everything() -> None:
    assert kept(sampling.TopKLogitsWarper(50), [1, 3, 2]) == [0, 1, 2]


@pytest.mark.parametrize("k", [1, 20, 593, 594, 40_000, 151_936])
@pytest.mark.parametrize("kind", ["plain", "ties", "minus infinity"])
def test_top_k_of_a_large_row_keeps_what_a_full_sort_keeps(k: int, kind: str) -> None:
    scores = np.random.default_rng(k).standard_normal(151_936).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "minus infinity":
        scores[30:] = -np.inf
    cut = np.sort(scores)[-k]

    assert (
        kept(sampling.TopKLogitsWarper(k), scores)
        == np.flatnonzero((scores >= cut) & (scores > -np.inf)).tolist()
    )


def test_min_p_keeps_the_lower_of_equal_best_tokens_at_least() -> None:
    assert kept(sampling.MinPLogitsWarper(1.0), [0, 2, 2, 1]) == [1, 2]
    assert kept(sampling.MinPLogitsWarper(1.0, min_tokens_to_keep=3), [1, 2, 1, 0]) == [0, 1, 2]


@pytest.mark.parametrize(
    "warper",
    [
        sampling.TopKLogitsWarper(2),
        sampling.TopPLogitsWarper(0.5),
        sampling.MinPLogitsWarper(0.5),
        sampling.TypicalLogitsWarper(0.5),
        sampling.EpsilonLogitsWarper(0.5),
        sampling.EtaLogitsWarper(0.5),
        sampling.TopHLogitsWarper(0.5),
        sampling.LogitNormalization(),
    ],
    ids=lambda warper: type(warper).__name__,
)
def test_row_without_any_token_stays_without(warper: sampling.LogitsProcessor) -> None:
    scores = np.full((2, 5), -np.inf, np.float32)
    scores[1, 3] = 2

    processed = warper(IDS, scores)

    assert np.isneginf(processed[0]).all()
    assert np.flatnonzero(processed[1] > -np.inf).tolist() == [3]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sampling.TopKLogitsWarper(0), "top_k must be an integer >= 1, got 0"),
        (lambda: sampling.TopPLogitsWarper(1.5), r"top_p must be a number in \[0, 1\], got 1\.5"),
        (lambda: sampling.MinPLogitsWarper(-1), r"min_p must be a number in \[0, 1\], got -1"),
        (
            lambda: sampling.TypicalLogitsWarper(1),
            r"typical_p must be a number in \(0, 1\), got 1",
        ),
        (lambda: sampling.TopHLogitsWarper(0), r"top_h must be a number in \(0, 1\], got 0"),
        (lambda: sampling.TopHLogitsWarper(True), "top_h must be a number"),
        (lambda: sampling.RepetitionPenaltyLogitsProcessor(2), r"got 2; write 2\.0"),  # type: ignore[arg-type]
        (lambda: sampling.NoRepeatNGramLogitsProcessor(0), "no_repeat_ngram_size must be"),
        (lambda: sampling.PresencePenaltyLogitsProcessor(np.nan, 0), "must be a finite number"),
    ],
)
def test_constructor_refuses_an_argument_out_of_range(build: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        build()


def test_repetition_penalty_needs_one_ignored_length_per_row() -> None:
    processor = sampling.RepetitionPenaltyLogitsProcessor(1.5, [1, 2])

    with pytest.raises(RequestError, match="one entry per row, got 2 for 1 rows"):
        processor(IDS, np.zeros((1, 4), np.float32))


def test_ngrams_of_a_prompt_shorter_than_n_ban_nothing() -> None:
    processor = sampling.EncoderNoRepeatNGramLogitsProcessor(5, np.array([[2, 1, 1]]))
    scores = np.zeros((1, 6), np.float32)

    assert processor(np.array([[2, 1, 1, 0, 0, 0]]), scores).tolist() == scores.tolist()


def test_ngrams_of_the_prompt_ban_as_soon_as_their_prefix_is_complete() -> None:
    processor = sampling.EncoderNoRepeatNGramLogitsProcessor(3, np.array([4, 1, 2, 5]))

    processed = processor(np.array([[1, 2]]), np.zeros((1, 6), np.float32))

    assert np.flatnonzero(np.isneginf(processed[0])).tolist() == [5]
