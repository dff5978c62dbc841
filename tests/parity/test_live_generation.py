"""transformers' generate() and ours on random arguments, side by side: the same sequences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_runtime import LLM

VOCAB = 128
GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOKEN = st.integers(0, VOCAB - 1)
SCORE_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference() -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = transformers.AutoModelForCausalLM.from_pretrained(
                GOLDEN / "models" / name, dtype=torch.float32, local_files_only=True
            ).eval()
        return loaded[name]

    transformers.logging.set_verbosity_error()
    return load


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]] | None]:
    """Ids [rows, length] and their mask: left-padded, or without any padding."""
    lengths = draw(st.lists(st.integers(1, 10), min_size=1, max_size=4))
    width = max(lengths)
    if draw(st.booleans()):
        row = st.lists(TOKEN, min_size=width, max_size=width)
        return [draw(row) for _ in lengths], None
    ids, mask = [], []
    for length in lengths:
        prompt = draw(st.lists(TOKEN, min_size=length, max_size=length))
        ids.append([0] * (width - length) + prompt)
        mask.append([0] * (width - length) + [1] * length)
    return ids, mask


OPTIONAL: dict[str, st.SearchStrategy[Any]] = {
    "repetition_penalty": st.floats(0.6, 2.0),
    "encoder_repetition_penalty": st.floats(0.6, 2.0),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "min_new_tokens": st.integers(1, 8),
    "suppress_tokens": st.lists(TOKEN, min_size=1, max_size=30),
    "begin_suppress_tokens": st.lists(TOKEN, min_size=1, max_size=30),
    "bad_words_ids": st.lists(st.lists(TOKEN, min_size=1, max_size=2), min_size=1, max_size=20),
    "forced_eos_token_id": TOKEN,
    "renormalize_logits": st.just(True),
}
SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(0.3, 2.5),
    "top_k": st.integers(1, VOCAB),
    "top_p": st.floats(0.1, 0.99),
    "min_p": st.floats(0.0, 0.5),
    "typical_p": st.floats(0.2, 0.99),
    "epsilon_cutoff": st.floats(0.001, 0.1),
    "eta_cutoff": st.floats(0.001, 0.1),
    "num_return_sequences": st.integers(2, 3),
}


@st.composite
def arguments(draw: st.DrawFn, *, sampling: bool) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 12)), "pad_token_id": 0}
    possible = OPTIONAL | (SAMPLING if sampling else {})
    for name in draw(st.lists(st.sampled_from(sorted(possible)), max_size=4, unique=True)):
        chosen[name] = draw(possible[name])
    if draw(st.booleans()):
        # Many end tokens, so that rows of a batch end at different steps.
        chosen["eos_token_id"] = draw(st.lists(TOKEN, min_size=1, max_size=40, unique=True))
    return chosen


def both(
    llm: LLM, model: Any, batch: tuple[Any, Any], chosen: dict[str, Any], seed: int | None
) -> tuple[Any, Any]:
    ids, mask = batch
    outputs = {"return_dict_in_generate": True, "output_scores": True}
    with warnings.catch_warnings():
        # Both warn of settings that do nothing; which of them is tested elsewhere.
        warnings.simplefilter("ignore")
        if seed is not None:
            torch.manual_seed(seed)
        theirs = model.generate(
            torch.tensor(ids),
            attention_mask=torch.ones(np.shape(ids), dtype=torch.int64)
            if mask is None
            else torch.tensor(mask),
            do_sample=seed is not None,
            **chosen,
            **outputs,
        )
        ours_chosen = chosen if seed is None else chosen | {"seed": seed, "rng": "torch"}
        ours = llm.generate(
            input_ids=ids,
            attention_mask=np.ones(np.shape(ids)) if mask is None else mask,
            do_sample=seed is not None,
            **ours_chosen,
            **outputs,
        )
        # Without outputs ended rows are not run and warpers see survivors only: same tokens.
        plain = llm.generate(
            input_ids=ids,
            attention_mask=np.ones(np.shape(ids)) if mask is None else mask,
            do_sample=seed is not None,
            **ours_chosen,
        )
    np.testing.assert_array_equal(plain.sequences, ours.sequences)
    return ours, theirs


def is_tie(ours: Any, theirs: Any, prompt_length: int) -> bool:
    """Whether the sequences part where the reference's choice hung on rounding."""
    a, b = ours.sequences, theirs.sequences.numpy()
    steps = min(a.shape[1], b.shape[1]) - prompt_length
    for step in range(steps):
        column = prompt_length + step
        rows = np.flatnonzero(a[:, column] != b[:, column])
        if rows.size:
            scores = theirs.scores[step][rows[0]].numpy()
            gap = abs(scores[a[rows[0], column]] - scores[b[rows[0], column]])
            return bool(gap < 1e-5 * np.abs(scores[np.isfinite(scores)]).max())
    return False


def assert_same(ours: Any, theirs: Any, prompt_length: int) -> None:
    expected = theirs.sequences.numpy()
    if ours.sequences.tolist() != expected.tolist():
        assert is_tie(ours, theirs, prompt_length), (ours.sequences, expected)
        return
    assert len(ours.scores) == len(theirs.scores)
    for mine, reference_scores in zip(ours.scores, theirs.scores, strict=True):
        scores = reference_scores.numpy()
        np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(scores))
        finite = np.isfinite(scores)
        if finite.any():
            scale = max(np.abs(scores[finite]).max(), 1e-3)
            assert np.abs(mine[finite] - scores[finite]).max() <= SCORE_TOLERANCE * scale


# Each of the two exercises another path: with and without q/k norms, tied and untied.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_tied_bias"])
@given(batch=batches(), chosen=arguments(sampling=False))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_greedy_search_with_random_arguments(
    golden_llm: Callable[[str], LLM],
    reference: Callable[[str], Any],
    name: str,
    batch: tuple[Any, Any],
    chosen: dict[str, Any],
) -> None:
    ours, theirs = both(golden_llm(name), reference(name), batch, chosen, None)

    assert_same(ours, theirs, len(batch[0][0]))


@pytest.mark.slow
@given(batch=batches(), chosen=arguments(sampling=True), seed=st.integers(0, 2**32 - 1))
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_seeded_sampling_with_random_arguments(
    golden_llm: Callable[[str], LLM],
    reference: Callable[[str], Any],
    batch: tuple[Any, Any],
    chosen: dict[str, Any],
    seed: int,
) -> None:
    name = "qwen2_untied"

    ours, theirs = both(golden_llm(name), reference(name), batch, chosen, seed)

    assert_same(ours, theirs, len(batch[0][0]))


@pytest.mark.slow
def test_comparison_notices_another_seed_and_another_penalty(
    golden_llm: Callable[[str], LLM], reference: Callable[[str], Any]
) -> None:
    llm, model = golden_llm("qwen2_untied"), reference("qwen2_untied")
    batch = ([[5, 17, 99, 42, 7], [1, 2, 3, 4, 5]], None)
    chosen: dict[str, Any] = {"max_new_tokens": 8}
    _, seeded = both(llm, model, batch, chosen, 3)
    other, _ = both(llm, model, batch, chosen, 4)
    _, plain = both(llm, model, batch, chosen, None)
    penalised, _ = both(llm, model, batch, chosen | {"repetition_penalty": 1.01}, None)

    for ours, theirs in ((other, seeded), (penalised, plain)):
        with pytest.raises(AssertionError, match=r"."):
            assert_same(ours, theirs, 5)
