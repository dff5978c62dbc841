"""transformers' own processors and ours on random inputs, side by side."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from qwen_runtime import sampling

IDS = st.integers(0, 2**32 - 1)
KEEP = st.integers(1, 4)
PENALTY = st.floats(0.2, 3.0)


def reference_of(name: str, arguments: dict[str, Any]) -> Any:
    tensors = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in arguments.items()
    }
    if name == "UnbatchedClassifierFreeGuidanceLogitsProcessor":
        logits = torch.from_numpy(arguments["unconditional_logits"](None))[:, None]

        class Model:
            def __call__(self, *_: Any, **__: Any) -> Any:
                return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)

        return reference.UnbatchedClassifierFreeGuidanceLogitsProcessor(
            arguments["guidance_scale"], Model()
        )
    return getattr(reference, name)(**tensors)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any], Any, Any]:
    """A processor's name, its arguments, ids [rows, length] and scores [rows, vocab]."""
    source = np.random.default_rng(draw(IDS))
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    vocab = draw(st.sampled_from([6, 33, 150, 7000]))
    few = draw(st.sampled_from([3, vocab]))
    ids = source.integers(0, min(few, vocab), (rows, length))
    # All distinct: torch leaves the order of equal scores open.
    base = np.linspace(-6, 6, vocab) + source.uniform(0, 5 / vocab, (rows, vocab))
    scores = np.stack([source.permutation(row) for row in base]).astype(np.float32)
    if draw(st.booleans()):
        scores[source.random(scores.shape) < 0.3] = -np.inf
        scores[:, vocab // 2] = 7.5
    prompt = ids[:, : draw(st.integers(1, length))]
    eos = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=3))
    sequences = st.lists(st.integers(0, min(few, vocab) - 1), min_size=1, max_size=3)
    words = draw(st.lists(sequences, min_size=1, max_size=6))
    options: dict[str, dict[str, Any]] = {
        "TemperatureLogitsWarper": {"temperature": draw(st.floats(0.05, 5.0))},
        "TopKLogitsWarper": {"top_k": draw(st.integers(1, 200)), "min_tokens_to_keep": draw(KEEP)},
        "TopPLogitsWarper": {"top_p": draw(st.floats(0, 1)), "min_tokens_to_keep": draw(KEEP)},
        "MinPLogitsWarper": {"min_p": draw(st.floats(0, 1)), "min_tokens_to_keep": draw(KEEP)},
        "TypicalLogitsWarper": {
            "mass": draw(st.floats(0.01, 0.99)),
            "min_tokens_to_keep": draw(KEEP),
        },
        "EpsilonLogitsWarper": {
            "epsilon": draw(st.floats(1e-5, 0.9)),
            "min_tokens_to_keep": draw(KEEP),
        },
        "EtaLogitsWarper": {
            "epsilon": draw(st.floats(1e-5, 0.9)),
            "min_tokens_to_keep": draw(KEEP),
        },
        "TopHLogitsWarper": {"top_h": draw(st.floats(0.01, 0.99))},
        "LogitNormalization": {},
        "InfNanRemoveLogitsProcessor": {},
        "RepetitionPenaltyLogitsProcessor": {
            "penalty": draw(PENALTY),
            "prompt_ignore_length": draw(
                st.sampled_from([None, 1, source.integers(0, length, rows)])
            ),
        },
        "EncoderRepetitionPenaltyLogitsProcessor": {
            "penalty": draw(PENALTY),
            "encoder_input_ids": prompt,
        },
        "NoRepeatNGramLogitsProcessor": {"ngram_size": draw(st.integers(1, 5))},
        "EncoderNoRepeatNGramLogitsProcessor": {
            "encoder_ngram_size": draw(st.integers(1, 5)),
            "encoder_input_ids": prompt,
        },
        "SequenceBiasLogitsProcessor": {
            "sequence_bias": {tuple(word): draw(st.floats(-3, 3)) for word in words}
        },
        "NoBadWordsLogitsProcessor": {"bad_words_ids": words, "eos_token_id": eos},
        "MinLengthLogitsProcessor": {
            "min_length": draw(st.integers(0, 25)),
            "eos_token_id": eos,
        },
        "MinNewTokensLengthLogitsProcessor": {
            "prompt_length_to_skip": prompt.shape[1],
            "min_new_tokens": draw(st.integers(0, 25)),
            "eos_token_id": eos,
        },
        "ForcedBOSTokenLogitsProcessor": {"bos_token_id": eos[0]},
        "ForcedEOSTokenLogitsProcessor": {
            "max_length": length + draw(st.integers(0, 2)),
            "eos_token_id": eos,
        },
        "ExponentialDecayLengthPenalty": {
            "exponential_decay_length_penalty": (
                draw(st.integers(0, 5)),
                draw(st.floats(0.5, 1.5)),
            ),
            "eos_token_id": eos,
            "input_ids_seq_length": prompt.shape[1],
        },
        "SuppressTokensLogitsProcessor": {"suppress_tokens": eos},
        "SuppressTokensAtBeginLogitsProcessor": {
            "begin_suppress_tokens": eos,
            "begin_index": length - draw(st.integers(0, 1)),
        },
        "UnbatchedClassifierFreeGuidanceLogitsProcessor": {
            "guidance_scale": draw(st.floats(-1, 3)),
            "unconditional_logits": lambda _: scores[:, ::-1].clip(-9).copy(),
        },
    }
    name = draw(st.sampled_from(sorted(options)))
    return name, options[name], ids, scores


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(calls())
def test_processor_gives_the_scores_of_transformers(
    call: tuple[str, dict[str, Any], Any, Any],
) -> None:
    name, arguments, ids, scores = call
    expected = reference_of(name, arguments)(
        torch.from_numpy(ids), torch.from_numpy(scores.copy())
    )

    got = getattr(sampling, name)(**arguments)(ids, scores)

    differing = np.isneginf(got) != np.isneginf(expected.numpy())
    if differing.any():
        # Rounding may move a cut by the token that lies on it, never further.
        assert issubclass(getattr(sampling, name), sampling.CandidateFilter), name
        assert differing.sum(axis=1).max() == 1
        assert _on_the_cut(name, arguments, scores, differing)
    both = ~np.isneginf(got) & ~np.isneginf(expected.numpy())
    np.testing.assert_allclose(got[both], expected.numpy()[both], rtol=2e-5, atol=2e-5)


def _on_the_cut(name: str, arguments: dict[str, Any], scores: Any, differing: Any) -> bool:
    """Whether nudging the threshold by a rounding error reproduces the difference."""
    field = next(k for k in arguments if k != "min_tokens_to_keep")
    outcomes = []
    for nudge in (1 - 1e-5, 1 + 1e-5):
        value = arguments[field] * nudge
        nudged = {**arguments, field: min(value, math.nextafter(1, 0))}
        outcomes.append(np.isneginf(getattr(sampling, name)(**nudged)(None, scores)))
    return bool((outcomes[0] != outcomes[1])[differing].all())


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.3, 2.0),
    st.integers(1, 60),
    st.floats(0.1, 0.99),
    st.sampled_from([151_936, 501]),
)
def test_qwen_chain_draws_the_tokens_of_transformers_and_torch(
    seed: int, temperature: float, top_k: int, top_p: float, vocab: int
) -> None:
    source = np.random.default_rng(seed)
    scores = (3 * source.standard_normal((1, vocab))).astype(np.float32)
    ids = source.integers(0, vocab, (1, 200))
    chain = reference.LogitsProcessorList(
        [
            reference.RepetitionPenaltyLogitsProcessor(1.05),
            reference.TemperatureLogitsWarper(temperature),
            reference.TopKLogitsWarper(top_k),
            reference.TopPLogitsWarper(top_p),
        ]
    )
    selector = sampling.TokenSelector(
        [
            sampling.RepetitionPenaltyLogitsProcessor(1.05),
            sampling.TemperatureLogitsWarper(temperature),
            sampling.TopKLogitsWarper(top_k),
            sampling.TopPLogitsWarper(top_p),
        ],
        generator=sampling.TorchGenerator(seed),
    )
    torch.manual_seed(seed)

    for _ in range(2):
        processed = chain(torch.from_numpy(ids), torch.from_numpy(scores))
        expected = torch.multinomial(torch.softmax(processed, dim=-1), 1)
        token, _ = selector.select(ids[0], scores[0])
        assert token == int(expected)
        ids = np.concatenate([ids, expected.numpy()], axis=1)


@pytest.mark.parametrize("penalty", [1.5, -0.5])
def test_presence_penalty_counts_generated_tokens_once(penalty: float) -> None:
    ids = np.array([[4, 4, 1, 2, 2, 9]])  # prompt: 4 4 1; 9 is beyond the vocabulary

    got = sampling.PresencePenaltyLogitsProcessor(penalty, 3)(ids, np.ones((1, 6), np.float32))

    np.testing.assert_allclose(got, [[1, 1, 1 - penalty, 1, 1, 1]])


@pytest.mark.parametrize("penalty", [1.5, -0.5])
def test_frequency_penalty_counts_every_generated_token(penalty: float) -> None:
    ids = np.array([[4, 4, 1, 2, 2, 4]])

    got = sampling.FrequencyPenaltyLogitsProcessor(penalty, 3)(ids, np.ones((1, 6), np.float32))

    np.testing.assert_allclose(got, [[1, 1, 1 - 2 * penalty, 1, 1 - penalty, 1]])


def test_logit_bias_is_added_to_single_tokens() -> None:
    got = sampling.LogitBiasLogitsProcessor({1: 2.0, 3: -100})(
        np.array([[0]]), np.zeros((1, 4), np.float32)
    )

    assert got.tolist() == [[0, 2, 0, -100]]


def test_prefix_function_wins_over_processors_that_banned_all_it_allows() -> None:
    processor = sampling.PrefixConstrainedLogitsProcessor(lambda batch, ids: [batch + 1], 2)
    theirs = reference.PrefixConstrainedLogitsProcessor(lambda batch, ids: [batch + 1], 2)
    scores = np.arange(16, dtype=np.float32).reshape(4, 4)
    scores[:2, 1] = -np.inf
    scores[2, 2] = -np.inf
    ids = np.zeros((4, 2), np.int64)

    got = processor(ids, scores)

    np.testing.assert_array_equal(got, theirs(torch.from_numpy(ids), torch.from_numpy(scores)))
    assert got[0, 1] == 0
    assert np.isneginf(got[2]).all()


def test_growth_beyond_float32_forces_the_end_without_inf() -> None:
    processor = sampling.ExponentialDecayLengthPenalty((0, 3.0), [1], 2)

    got = processor(np.zeros((1, 3000), np.int64), np.ones((1, 3), np.float32))

    assert got[0, 1] == np.finfo(np.float32).max
