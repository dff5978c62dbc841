"""The fused path takes the token of the plain chain, from the same survivors."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime import sampling
from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.seen import SeenTokens

VOCABULARIES = st.sampled_from([7, 64, 5000, 40_000])


def logits(source: np.random.Generator, size: int, kind: str) -> Any:
    scores = (3 * source.standard_normal(size)).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "removed":
        scores[source.random(size) < 0.7] = -np.inf
        scores[size // 2] = 1
    elif kind == "flat":
        scores[:] = 0.25
    return scores


@st.composite
def chains(draw: st.DrawFn) -> list[sampling.ProcessorCallable]:
    chain: list[sampling.ProcessorCallable] = []
    if draw(st.booleans()):
        chain.append(sampling.RepetitionPenaltyLogitsProcessor(draw(st.sampled_from([0.8, 1.3]))))
    if draw(st.booleans()):
        chain.append(sampling.TemperatureLogitsWarper(draw(st.sampled_from([0.3, 0.7, 1.9]))))
    least = draw(st.sampled_from([1, 3]))
    if draw(st.booleans()):
        chain.append(sampling.TopKLogitsWarper(draw(st.integers(1, 300)), least))
    if draw(st.booleans()):
        chain.append(sampling.TopPLogitsWarper(draw(st.floats(0, 1)), least))
    if draw(st.booleans()):
        chain.append(sampling.MinPLogitsWarper(draw(st.floats(0, 1)), least))
    if draw(st.booleans()):
        chain.append(sampling.TypicalLogitsWarper(draw(st.floats(0.01, 0.99)), least))
    if draw(st.booleans()):
        chain.append(sampling.EtaLogitsWarper(draw(st.floats(1e-4, 0.5)), least))
    if draw(st.booleans()):
        chain.append(sampling.LogitNormalization())
    return chain


@settings(max_examples=150, deadline=None)
@given(
    chains(),
    VOCABULARIES,
    st.sampled_from(["plain", "ties", "removed", "flat"]),
    st.integers(0, 10**6),
    st.sampled_from(["default", "torch"]),
)
def test_fused_path_keeps_and_draws_what_the_plain_chain_does(
    chain: list[sampling.ProcessorCallable], size: int, kind: str, seed: int, rng: str
) -> None:
    source = np.random.default_rng(seed)
    ids = source.integers(0, size, 30)
    fused = sampling.TokenSelector(chain, generator=sampling.make_generator(rng, seed))
    plain = sampling.TokenSelector(
        chain, generator=sampling.make_generator(rng, seed), return_scores=True
    )

    for _ in range(3):
        raw = logits(source, size, kind)
        before = raw.copy()
        token, nothing = fused.select(ids, raw)
        expected, scores = plain.select(ids, raw)

        np.testing.assert_array_equal(raw, before)
        assert nothing is None
        assert scores is not None
        assert token == expected
        assert scores[token] > -np.inf
        left = sampling.Candidates.from_row(fused._dense(ids[None], raw[None])[0])
        for processor in fused._tail:
            left = processor.apply(left)
        np.testing.assert_array_equal(left.to_row(), scores)
        ids = np.append(ids, token)


def test_filters_behind_the_first_see_survivors_only() -> None:
    seen = []

    class Spy(sampling.TopPLogitsWarper):
        def keep(self, values: Any) -> Any:
            seen.append(values.shape[0])
            return super().keep(values)

    selector = sampling.TokenSelector(
        [sampling.TopKLogitsWarper(20), Spy(0.8)], generator=sampling.DefaultGenerator(0)
    )

    selector.select(np.arange(3), np.arange(5000, dtype=np.float32))

    assert seen == [20]


def test_greedy_takes_the_lowest_of_equal_tokens_after_the_processors() -> None:
    raw = np.array([0, 3, 3, 4], np.float32)
    ids = np.array([3])

    plain, _ = sampling.TokenSelector().select(ids, raw)
    penalised, scores = sampling.TokenSelector(
        [sampling.RepetitionPenaltyLogitsProcessor(2.0)], return_scores=True
    ).select(ids, raw)

    assert (plain, penalised) == (3, 1)
    assert scores is not None
    assert scores.tolist() == [0, 3, 3, 2]


def test_returned_scores_are_never_the_logits_buffer() -> None:
    raw = np.ones(5, np.float32)

    _, scores = sampling.TokenSelector(return_scores=True).select(np.array([1]), raw)

    assert scores is not None
    assert not np.shares_memory(scores, raw)


def test_chain_that_removes_every_token_is_an_error_when_sampling() -> None:
    selector = sampling.TokenSelector(
        [sampling.SuppressTokensLogitsProcessor(range(6)), sampling.TopKLogitsWarper(2)],
        generator=sampling.DefaultGenerator(0),
    )

    with pytest.raises(RequestError, match="logits processors removed all"):
        selector.select(np.array([1]), np.ones(6, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logit_is_an_error_behind_filters_too(bad: float) -> None:
    raw = np.arange(9000, dtype=np.float32)
    raw[5] = bad
    chain = [sampling.TopKLogitsWarper(20), sampling.TopPLogitsWarper(0.8)]

    for scores in (False, True):
        selector = sampling.TokenSelector(
            chain, generator=sampling.DefaultGenerator(0), return_scores=scores
        )
        with pytest.raises(RequestError, match=r"nan or \+inf"):
            selector.select(np.array([1]), raw)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), max_size=20), min_size=1, max_size=12))
def test_seen_tokens_follow_any_change_of_the_sequence(sequences: list[list[int]]) -> None:
    seen = SeenTokens(10)
    for sequence in sequences:
        ids = np.array(sequence, dtype=np.int64)

        distinct = seen.update(ids)

        assert distinct.tolist() == list(dict.fromkeys(i for i in sequence if i < 10))


def test_seen_tokens_follow_a_long_growing_and_cut_sequence() -> None:
    source = np.random.default_rng(0)
    ids = source.integers(0, 500, 700)
    seen = SeenTokens(500)
    for length in [*range(1, 700, 13), 200, 201, 650, 3, 700]:
        assert set(seen.update(ids[:length])) == set(ids[:length].tolist())


@pytest.mark.slow
def test_step_of_a_large_vocabulary_is_fast() -> None:
    source = np.random.default_rng(0)
    size = 151_936
    raw = [(3 * source.standard_normal(size)).astype(np.float32) for _ in range(20)]
    ids = source.integers(0, size, 500)
    defaults = sampling.TokenSelector(
        [
            sampling.RepetitionPenaltyLogitsProcessor(1.05),
            sampling.TemperatureLogitsWarper(0.7),
            sampling.TopKLogitsWarper(20),
            sampling.TopPLogitsWarper(0.8),
        ],
        generator=sampling.DefaultGenerator(0),
    )

    def median_ms(selector: sampling.TokenSelector) -> float:
        times = []
        for scores in raw * 3:
            start = time.perf_counter()
            selector.select(ids, scores)
            times.append(1e3 * (time.perf_counter() - start))
        return float(np.median(times))

    # Several times the measured cost (0.02 and 0.2 ms), for a loaded machine.
    assert median_ms(sampling.TokenSelector()) < 0.2
    assert median_ms(defaults) < 1.0
