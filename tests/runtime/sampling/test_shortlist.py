"""A row's highest logits alone give the token of the whole row, or say that they cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_runtime import sampling
from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.shortlist import Shortlist

RANKS = (1, 2, 3, 5, 6, 7, 20, 24, 40)
PENALTIES = st.sampled_from([0.7, 1.0, 1.05, 1.3, 8.0])
AMOUNTS = st.sampled_from([-3.0, 0.0, 0.5, 2.0])
BIASES = st.sampled_from([-np.inf, -100.0, -0.5, 0.75, 100.0])
QWEN = (0.7, 20, 0.8)


def logits(source: np.random.Generator, size: int, kind: str) -> Any:
    scores = (3 * source.standard_normal(size)).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "bfloat16":
        scores = (scores.view(np.uint32) & 0xFFFF0000).view(np.float32)
    elif kind == "removed":
        scores[source.random(size) < 0.9] = -np.inf
        scores[size // 2] = 1
    elif kind == "negative":
        scores -= 30
    return scores


def highest(scores: Any, count: int, source: np.random.Generator) -> tuple[Any, Any]:
    """As a device brings them: which of equal ones come is left open, and in which order."""
    shuffled = source.permutation(len(scores))
    tokens = shuffled[np.argsort(-scores[shuffled], kind="stable")][:count]
    tokens = source.permutation(tokens)
    return scores[tokens], tokens


@st.composite
def chains(draw: st.DrawFn, prompt_length: int) -> list[sampling.ProcessorCallable]:
    chain: list[sampling.ProcessorCallable] = []
    few = st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True)
    if draw(st.booleans()):
        pairs: dict[tuple[int, ...], float] = {(token,): draw(BIASES) for token in draw(few)}
        pairs[(draw(st.integers(0, 60)), draw(st.integers(0, 60)))] = draw(BIASES)
        chain.append(sampling.SequenceBiasLogitsProcessor(pairs))
    if draw(st.booleans()):
        chain.append(sampling.LogitBiasLogitsProcessor({t: draw(BIASES) for t in draw(few)}))
    if draw(st.booleans()):
        skip = draw(st.sampled_from([None, 2, [3]]))
        chain.append(sampling.RepetitionPenaltyLogitsProcessor(draw(PENALTIES), skip))
    if draw(st.booleans()):
        amount = draw(AMOUNTS)
        chain.append(sampling.PresencePenaltyLogitsProcessor(amount, prompt_length))
    if draw(st.booleans()):
        amount = draw(AMOUNTS)
        chain.append(sampling.FrequencyPenaltyLogitsProcessor(amount, prompt_length))
    if draw(st.booleans()):
        chain.append(sampling.NoRepeatNGramLogitsProcessor(draw(st.integers(1, 3))))
    if draw(st.booleans()):
        chain.append(sampling.NoBadWordsLogitsProcessor([[t] for t in draw(few)], 3))
    if draw(st.booleans()):
        chain.append(sampling.MinLengthLogitsProcessor(draw(st.integers(0, 40)), [3, -1]))
    if draw(st.booleans()):
        wanted = draw(st.integers(0, 6))
        chain.append(sampling.MinNewTokensLengthLogitsProcessor(prompt_length, wanted, 3))
    if draw(st.booleans()):
        chain.append(sampling.ForcedEOSTokenLogitsProcessor(draw(st.integers(10, 40)), 3))
    if draw(st.booleans()):
        chain.append(sampling.SuppressTokensLogitsProcessor([*draw(few), 10**6, -2]))
    if draw(st.booleans()):
        begin = prompt_length + draw(st.integers(0, 2))
        chain.append(sampling.SuppressTokensAtBeginLogitsProcessor(draw(few), begin))
    return chain


@st.composite
def warpers(draw: st.DrawFn) -> list[sampling.ProcessorCallable]:
    chain: list[sampling.ProcessorCallable] = []
    if draw(st.booleans()):
        # The last makes scores equal that differed.
        chain.append(sampling.TemperatureLogitsWarper(draw(st.sampled_from([0.3, 0.7, 1e38]))))
    least = draw(st.sampled_from([1, 3]))
    chain.append(sampling.TopKLogitsWarper(draw(st.sampled_from(RANKS)), least))
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


@settings(max_examples=500, deadline=None)
@given(
    st.data(),
    st.sampled_from([64, 64, 5000]),
    st.sampled_from(["plain", "ties", "bfloat16", "removed", "negative"]),
    st.sampled_from([1, 4, 7, 24, 64]),
    st.sampled_from([None, "default", "torch"]),
    st.integers(0, 10**6),
)
def test_the_highest_logits_give_the_token_of_the_whole_row_or_refuse(
    data: st.DataObject, size: int, kind: str, count: int, rng: str | None, seed: int
) -> None:
    source = np.random.default_rng(seed)
    ids = source.integers(0, 64, source.integers(4, 30))
    chain = data.draw(chains(len(ids)))
    if rng is not None:
        chain += data.draw(warpers())
    ours, whole = (
        sampling.TokenSelector(
            chain, generator=None if rng is None else sampling.make_generator(rng, seed)
        )
        for _ in range(2)
    )
    for _ in range(4):
        scores = logits(source, size, kind)
        try:
            expected, _ = whole.select(ids, scores)
        except RequestError:  # nothing is left, which only the whole row may say
            assert ours.shorten(ids, *highest(scores, count, source), size) is None
            return
        found = ours.shorten(ids, *highest(scores, count, source), size)
        token = ours.select(ids, scores)[0] if found is None else ours.draw(found)
        assert token == expected
        ids = np.append(ids, token)


@pytest.mark.parametrize(("count", "refused"), [(24, 100), (64, 0)])
def test_qwens_own_settings_are_refused_only_where_too_few_logits_are_brought(
    count: int, refused: int
) -> None:
    source, rows = np.random.default_rng(0), 100
    ids = source.integers(0, 150_000, 2000)
    selector = sampling.TokenSelector(
        [
            sampling.RepetitionPenaltyLogitsProcessor(1.1),
            sampling.TemperatureLogitsWarper(QWEN[0]),
            sampling.TopKLogitsWarper(QWEN[1]),
            sampling.TopPLogitsWarper(QWEN[2]),
        ],
        generator=sampling.make_generator("default", 0),
    )
    found = []
    for _ in range(rows):
        scores = logits(source, 150_000, "plain")
        # What was seen is likely to come again, as in text.
        scores[ids] += 5
        found.append(selector.shorten(ids, *highest(scores, count, source), len(scores)))
    assert sum(each is None for each in found) == refused


def survivors(
    chain: Sequence[sampling.ProcessorCallable], values: Any, count: int, ids: Any = (0,)
) -> Any:
    """Ids that survive the highest ``count`` logits; None where they are refused."""
    selector = sampling.TokenSelector(chain, generator=sampling.make_generator("default", 0))
    scores = np.asarray(values, np.float32)
    tokens = np.argsort(-scores, kind="stable")[:count]
    found = selector.shorten(np.asarray(ids), scores[tokens], tokens, len(scores))
    return None if found is None or found.indices is None else found.indices.tolist()


def test_a_tie_across_the_border_is_refused_and_one_above_it_kept() -> None:
    top2 = [sampling.TopKLogitsWarper(2)]

    assert survivors(top2, [5, 4, 4, 4, 1], 4) is None
    assert survivors(top2, [5, 4, 4, 4, 1], 5) == [0, 1, 2, 3]
    assert survivors(top2, [5, 4, 4, 3, 1], 4) == [0, 1, 2]


def test_scores_that_are_equal_only_after_the_division_are_refused() -> None:
    temperature, top2 = np.float32(1.9), sampling.TopKLogitsWarper(2)
    value = np.float32(1.9)
    while (above := np.nextafter(value, np.float32(2))) / temperature > value / temperature:
        value = above

    assert survivors([top2], [3.0, above, value, 0.0], 3) == [0, 1]
    chain = [sampling.TemperatureLogitsWarper(1.9), top2]
    assert survivors(chain, [3.0, above, value, 0.0], 3) is None
    assert survivors(chain, [3.0, above, 1.0, 0.0], 3) == [0, 1]


def test_penalties_that_reach_below_the_border_are_refused() -> None:
    chain = [sampling.RepetitionPenaltyLogitsProcessor(2.0), sampling.TopKLogitsWarper(2)]
    values = [8.0, 7.0, 6.0, 5.0, 1.0]

    assert survivors(chain, values, 4, [4]) == [0, 1]
    assert survivors(chain, values, 4, [0]) == [1, 2]  # 4, which is below the fourth
    assert survivors(chain, values, 4, [0, 1]) is None


def test_a_reward_raises_what_is_not_known() -> None:
    reward = sampling.RepetitionPenaltyLogitsProcessor(0.5)
    chain = [reward, sampling.TopKLogitsWarper(2)]

    assert survivors(chain, [8.0, 7.0, 6.0, 1.0], 3, [3]) is None
    assert survivors(chain, [8.0, 7.0, 3.0, 1.0], 3, [3]) == [0, 1]


def test_a_bias_on_what_is_not_known_moves_the_border_and_one_on_what_is_does_not() -> None:
    def chain(token: int) -> list[sampling.ProcessorCallable]:
        bias = sampling.LogitBiasLogitsProcessor({token: 50.0})
        return [bias, sampling.TopKLogitsWarper(2)]

    assert survivors(chain(4), [8, 7, 6, 5, 4], 3) is None
    assert survivors(chain(2), [8, 7, 6, 5, 4], 3) == [0, 2]


def test_a_penalty_that_rounds_to_nothing_needs_the_whole_row() -> None:
    tiny = sampling.RepetitionPenaltyLogitsProcessor(1e-46)  # 0 in float32
    scores, ids = np.array([5, 4, 3, -np.inf], np.float32), np.array([3])
    selector = sampling.TokenSelector([tiny])

    with np.errstate(invalid="ignore"):
        assert np.isnan(tiny(ids[None], scores[None])[0, 3])
        assert selector.shorten(ids, scores[:3], np.arange(3), 4) is None


@pytest.mark.parametrize("token", [2**70, -(2**70), 4, -1])
def test_bans_outside_of_the_vocabulary_do_nothing_however_large(token: int) -> None:
    for ban in (
        sampling.SuppressTokensLogitsProcessor([token, 1]),
        sampling.MinLengthLogitsProcessor(9, [token, 1]),
    ):
        assert survivors([ban, sampling.TopKLogitsWarper(1)], [5, 6, 4, 3], 3) == [0]


def test_all_of_a_small_vocabulary_is_never_refused() -> None:
    flat = [1.0] * 8

    assert survivors([sampling.TopKLogitsWarper(3)], flat, 8) == list(range(8))
    assert survivors([sampling.TopKLogitsWarper(30)], flat, 8) == list(range(8))


def test_rows_of_mostly_removed_tokens_need_no_border() -> None:
    values = [-np.inf] * 20
    values[7], values[3] = 2.0, 1.0

    assert survivors([sampling.TopKLogitsWarper(5)], values, 4) == [3, 7]
    assert survivors([sampling.TopKLogitsWarper(5)], [-np.inf] * 20, 4) is None


@pytest.mark.parametrize(
    ("values", "tokens"),
    [([2.0, np.nan], [4, 5]), ([2.0, 1.0], [4, 2**31 - 1]), ([2.0, 1.0], [-1, 4])],
)
def test_what_a_device_should_not_bring_is_refused(values: list[float], tokens: list[int]) -> None:
    assert Shortlist.of(np.array(values, np.float32), np.array(tokens), 10) is None


class Doubling(sampling.SuppressTokensLogitsProcessor):
    """A caller's own, built on one of ours."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return 2 * super().__call__(input_ids, scores)


class Favouring(sampling.TopKLogitsWarper):
    """A caller's own filter."""


class Reversing(sampling.TopPLogitsWarper):
    """A caller's own, which does more than filter."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return -super().__call__(input_ids, scores)


def plus_one(input_ids: Any, scores: Any) -> Any:
    return scores + 1


TEMPERATURE, TOP_K, TOP_P = QWEN


@pytest.mark.parametrize(
    ("chain", "num_top"),
    [
        ([sampling.TemperatureLogitsWarper(TEMPERATURE), sampling.TopKLogitsWarper(TOP_K)], 20),
        ([sampling.TopKLogitsWarper(1, 3), sampling.TopPLogitsWarper(TOP_P)], 3),
        ([sampling.TemperatureLogitsWarper(TEMPERATURE)], None),
        ([], None),
        ([sampling.TopPLogitsWarper(TOP_P), sampling.TopKLogitsWarper(TOP_K)], None),
        ([sampling.TopHLogitsWarper(0.5), sampling.TopKLogitsWarper(TOP_K)], None),
        ([plus_one, sampling.TopKLogitsWarper(TOP_K)], None),
        ([Doubling([3]), sampling.TopKLogitsWarper(TOP_K)], None),
        ([Favouring(TOP_K)], None),
        ([sampling.TopKLogitsWarper(TOP_K), Reversing(TOP_P)], None),
        ([sampling.InfNanRemoveLogitsProcessor(), sampling.TopKLogitsWarper(TOP_K)], None),
        ([sampling.TopKLogitsWarper(TOP_K), plus_one], None),
    ],
)
def test_only_chains_that_begin_with_top_k_and_known_processors_say_how_many_they_need(
    chain: list[Any], num_top: int | None
) -> None:
    generator = sampling.make_generator("default", 0)

    assert sampling.TokenSelector(chain, generator=generator).num_top == num_top
    returning = sampling.TokenSelector(chain, generator=generator, return_scores=True)
    assert returning.num_top is None


def test_greedy_search_under_a_penalty_needs_one() -> None:
    penalty = sampling.RepetitionPenaltyLogitsProcessor(1.05)

    assert sampling.TokenSelector([penalty]).num_top == 1
    assert sampling.TokenSelector([plus_one]).num_top is None
    assert sampling.TokenSelector([sampling.LogitNormalization()]).num_top is None


def test_a_callers_own_filter_is_called_as_it_is_written() -> None:
    chain = [Reversing(1.0), sampling.TopKLogitsWarper(1)]
    selector = sampling.TokenSelector(chain, generator=sampling.make_generator("default", 0))

    assert selector.select(np.array([0]), np.array([1, 2, 3], np.float32))[0] == 0
