"""Beam search and beam sampling: transformers' results, and caches moved as little as possible."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_export.checkpoint import ModelConfig, require_supported
from qwen_export.errors import UnsupportedModelError
from qwen_runtime import LLM, GenerationConfig, RequestError
from qwen_runtime.generation.base import FloatArray
from qwen_runtime.generation.beam import BeamDecoding
from qwen_runtime.generation.prompts import PromptBatch
from qwen_runtime.generation_config import GenerationConfigWarning, resolve
from qwen_runtime.text import TextStreamer

GOLDEN = Path(__file__).parents[2] / "data" / "golden"
CASES: list[dict[str, Any]] = [
    case
    for case in json.loads((GOLDEN / "e2e.json").read_text("utf-8"))
    if case["kwargs"].get("num_beams", 1) > 1
]


def is_supported(model: str) -> bool:
    path = GOLDEN / "models" / model / "config.json"
    try:
        require_supported(ModelConfig.from_dict(json.loads(path.read_text("utf-8")), path))
    except UnsupportedModelError:
        return False
    return True


RUN = [case for case in CASES if is_supported(case["model"])]


@pytest.fixture(autouse=True)
def settings_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GenerationConfigWarning)
        yield


def arguments_of(case: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(case["kwargs"])
    arguments |= {"input_ids": case["input_ids"], "attention_mask": case["attention_mask"]}
    if case["seed"] is not None:
        arguments |= {"seed": case["seed"], "rng": "torch"}
    if case["prefix_fn"] == "allow_mod3":
        arguments["prefix_allowed_tokens_fn"] = lambda row, ids: [
            token for token in range(128) if token % 3 == (len(ids) + row) % 3
        ]
    return arguments


def test_all_recorded_searches_run_whose_model_can_be_exported() -> None:
    assert len(CASES) == 56
    assert len(RUN) == 56
    assert sum(case["kwargs"]["do_sample"] for case in RUN if "do_sample" in case["kwargs"]) == 2


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case["name"],
            marks=[] if case["model"] == "qwen2_untied" else [pytest.mark.slow],
        )
        for case in RUN
    ],
)
def test_recorded_search_is_reproduced(
    case: dict[str, Any], golden_llm: Callable[[str], LLM]
) -> None:
    output = golden_llm(case["model"]).generate(
        **arguments_of(case),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )

    assert output.sequences.tolist() == case["sequences"]
    if "beam_indices" in case:
        assert output.beam_indices.tolist() == case["beam_indices"]
    with np.load(GOLDEN / "e2e.npz") as recorded:
        for kind in ("scores", "logits", "sequences_scores"):
            if f"e{case['idx']}_{kind}" in recorded:
                expected = recorded[f"e{case['idx']}_{kind}"]
                ours = np.asarray(getattr(output, kind))
                np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(expected))
                scale = np.abs(expected[np.isfinite(expected)]).max()
                np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3 * scale)


def test_token_scores_of_a_beam_add_up_to_its_score(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(
        np.array([[5, 17, 99], [8, 3, 4]]),
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=6,
        eos_token_id=list(range(40)),
        length_penalty=0.7,
        repetition_penalty=1.3,
        logprobs=True,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )

    assert output.beam_indices.dtype == np.int32
    for row, one in enumerate(output.outputs):
        total = sum(
            output.scores[step][beam, token]
            for step, (beam, token) in enumerate(zip(one.beam_indices, one.token_ids, strict=True))
        )
        assert one.sequence_score == pytest.approx(total / len(one.token_ids) ** 0.7, rel=1e-5)
        assert one.sequence_score == output.sequences_scores[row]
        for step, noted in enumerate(one.logprobs):
            logits = one.logits[step]
            assert noted.token_id == one.token_ids[step]
            assert noted.logprob == pytest.approx(
                logits[noted.token_id] - np.log(np.exp(logits).sum()), abs=1e-4
            )


def test_prompts_of_a_list_are_searched_as_if_alone(tiny_llm: LLM) -> None:
    prompts = [[5, 17, 99], [8], [1, 2, 3, 4, 5, 6]]
    for sampled in ({}, {"do_sample": True, "seed": 7}):
        arguments = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5} | sampled

        together = tiny_llm.generate(prompts, **arguments)
        alone = [one for prompt in prompts for one in tiny_llm.generate(prompt, **arguments)]

        assert [one.token_ids for one in together] == [one.token_ids for one in alone]
        assert len(together) == 6


def test_default_generator_draws_the_same_beams_for_the_same_seed(tiny_llm: LLM) -> None:
    def draw(seed: int) -> Any:
        return tiny_llm.generate(
            [5, 17, 99], num_beams=4, do_sample=True, seed=seed, max_new_tokens=8
        ).token_ids

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(5)}) > 1


def test_beams_end_at_a_stop_string_and_their_text_before_it(text_llm: LLM) -> None:
    arguments = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 12,
        "eos_token_id": None,
        "length_penalty": 0.0,  # a sum of log-probabilities: the shorter one wins
    }
    letters = text_llm.generate("hello", **arguments)[0].text
    stop = [
        character for character in letters if character.isprintable() and character != "\ufffd"
    ]

    found = text_llm.generate("hello", stop=stop, **arguments)
    kept = text_llm.generate("hello", stop_strings=stop, **arguments)

    assert [one.token_ids for one in found] == [one.token_ids for one in kept]
    assert any(one.finish_reason == "stop" for one in found)
    for one, whole in zip(found, kept, strict=True):
        assert (one.stop_reason in stop) == (one.finish_reason == "stop")
        assert not any(string in one.text for string in stop)
        assert whole.text.startswith(one.text)


def test_what_needs_tokens_as_they_come_is_refused(text_llm: LLM) -> None:
    with pytest.raises(RequestError, match="a streamer needs num_beams=1") as caught:
        text_llm.generate(
            "hello", num_beams=2, streamer=TextStreamer(text_llm.tokenizer), max_new_tokens=2
        )
    assert caught.value.param == "streamer"
    with pytest.raises(RequestError, match="one sequence as it grows, got num_beams=2"):
        text_llm.stream("hello", num_beams=2, max_new_tokens=2)
    with pytest.raises(RequestError, match="num_return_sequences must be at most num_beams=2"):
        text_llm.generate("hello", num_beams=2, num_return_sequences=3, max_new_tokens=2)


def test_criteria_see_every_candidate_and_their_errors_leave_the_engine_usable(
    tiny_llm: LLM,
) -> None:
    shapes = []

    def criterion(ids: Any, scores: Any) -> Any:
        shapes.append((ids.shape, scores is None))
        if ids.shape[1] == 6:
            raise RuntimeError("enough")
        return np.zeros(len(ids), bool)

    with pytest.raises(RuntimeError, match="enough"):
        tiny_llm.generate(
            [5, 17, 99], num_beams=3, max_new_tokens=9, stopping_criteria=[criterion]
        )

    assert shapes == [((6, 4), True), ((6, 5), True), ((6, 6), True)]
    assert tiny_llm._engine.model.num_used_slots == 0
    assert tiny_llm.generate([5, 17, 99], num_beams=3, max_new_tokens=2).token_ids


def machine(prompts: PromptBatch, *, vocab_size: int = 20, **arguments: Any) -> BeamDecoding:
    config = resolve(
        None,
        GenerationConfig(),
        {"num_beams": 3, "max_new_tokens": 8} | arguments,
        prompt_length=prompts.input_ids.shape[1],
        vocab_size=vocab_size,
    )
    return BeamDecoding(prompts, config)


class Rows:
    """Stands for a cache: remembers the tokens of every row and answers with random logits."""

    def __init__(self, decoding: BeamDecoding, vocab_size: int, seed: int) -> None:
        self.decoding, self.vocab_size = decoding, vocab_size
        self.held: dict[int, list[int]] = {}
        self.random = np.random.default_rng(seed)
        self.num_copied: list[int] = []
        self.row_of_beam: list[int] = []

    def step(self) -> list[FloatArray]:
        self.row_of_beam = self.decoding._cache_rows.tolist()
        step = self.decoding.next_step()
        sources = {copy.src for copy in step.copies}
        assert sources.isdisjoint(copy.dst for copy in step.copies)
        for copy in step.copies:
            assert len(self.held[copy.src]) >= copy.length
            self.held[copy.dst] = self.held[copy.src][: copy.length]
        self.num_copied.append(len(step.copies))
        for feed in step.feeds:
            kept = self.held.get(feed.row, [])[: feed.past]
            assert len(kept) == feed.past
            self.held[feed.row] = kept + feed.tokens.tolist()
        logits = [
            self.random.standard_normal((1, self.vocab_size)).astype(np.float32) * 3
            for _ in step.feeds
        ]
        self.decoding.accept(logits)
        return logits


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 3), st.booleans())
def test_every_beam_finds_its_own_tokens_in_its_cache_row(
    seed: int, beams: int, items: int, sampled: bool
) -> None:
    prompts = PromptBatch.single([1, 2], 20)
    if items > 1:
        ids = np.arange(items * 3).reshape(items, 3) % 20
        mask = np.ones_like(ids)
        mask[0, 0] = 0
        prompts = PromptBatch.padded(ids, mask, 20)
    decoding = machine(prompts, num_beams=beams, eos_token_id=[7, 9], do_sample=sampled, seed=seed)
    rows = Rows(decoding, 20, seed)
    while not decoding.finished:
        running = decoding._hypotheses.running_ids.copy()
        first = not rows.held
        rows.step()
        if first:
            continue
        for beam, ids in enumerate(running.tolist()):
            pads = prompts.input_ids.shape[1] - len(prompts.tokens[beam // beams])
            assert rows.held[rows.row_of_beam[beam]] == ids[pads:]
    assert max(rows.num_copied) <= items * (beams - 1)


def test_beams_that_only_change_places_are_not_copied() -> None:
    decoding = machine(PromptBatch.single([1, 2], 20), num_beams=2)
    rows = Rows(decoding, 20, 0)
    rows.step()
    step = decoding.next_step()
    assert len(step.copies) == 1  # the first fork: both beams come from one prompt

    def favour(beam_logits: Sequence[float]) -> list[FloatArray]:
        return [np.full((1, 20), -9, np.float32) + _peak(value) for value in beam_logits]

    order = np.argsort(decoding._cache_rows)
    decoding.accept([favour([3, 9])[beam] for beam in order])

    assert decoding.next_step().copies == ()


def _peak(value: float) -> FloatArray:
    """Logits of one token far above the others, the more so the larger the value."""
    row = np.zeros((1, 20), np.float32)
    row[0, 4] = value * 4
    return row


def test_cancelled_search_returns_the_beams_that_ran() -> None:
    decoding = machine(PromptBatch.single([1, 2], 20), num_beams=3, num_return_sequences=2)
    rows = Rows(decoding, 20, 0)
    for _ in range(3):
        rows.step()
    decoding.cancel()

    assert decoding.finished
    assert [state.stop.reason for state in decoding.rows if state.stop] == ["cancelled"] * 2
    assert [len(state.token_ids) for state in decoding.rows] == [3, 3]
    assert decoding.sequences_scores[0] >= decoding.sequences_scores[1] > -1e8


@pytest.fixture(scope="module")
def reference() -> Any:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "models" / "qwen2_untied")
    return model.float().eval()


@st.composite
def searches(draw: st.DrawFn) -> tuple[Any, Any, dict[str, Any]]:
    source = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, length = draw(st.integers(1, 3)), draw(st.integers(2, 9))
    ids = source.integers(1, 128, (rows, length))
    mask = np.ones_like(ids)
    for row in range(rows):
        pads = draw(st.integers(0, length - 1)) if row else 0
        ids[row, :pads] = mask[row, :pads] = 0
    beams = draw(st.integers(2, 5))
    arguments: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": draw(st.integers(1, beams)),
        "max_new_tokens": draw(st.integers(1, 10)),
        "early_stopping": draw(st.sampled_from([True, False, "never"])),
        "length_penalty": draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])),
        "eos_token_id": draw(
            st.one_of(st.none(), st.lists(st.integers(0, 127), min_size=1, max_size=30))
        ),
        "pad_token_id": draw(st.sampled_from([0, 127])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "no_repeat_ngram_size": draw(st.sampled_from([0, 2])),
        "min_new_tokens": draw(st.sampled_from([None, 2])),
        "do_sample": False,
    }
    if draw(st.booleans()):
        arguments |= {
            "do_sample": True,
            "temperature": 0.8,
            "top_k": draw(st.sampled_from([0, 40])),
        }
    return ids, mask, arguments


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(search=searches(), seed=st.integers(0, 1000))
def test_random_searches_equal_transformers(
    search: Any, seed: int, tiny_llm: LLM, reference: Any
) -> None:
    import torch

    ids, mask, arguments = search
    torch.manual_seed(seed)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = reference.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )

    output = tiny_llm.generate(ids, attention_mask=mask, rng="torch", seed=seed, **arguments)

    theirs = expected.sequences.numpy()
    if output.sequences.tolist() != theirs.tolist():
        # Only where two hypotheses are as good as equal may another one have won.
        gap = np.abs(np.sort(output.sequences_scores) - np.sort(expected.sequences_scores.numpy()))
        assert gap.max() < 1e-4, (output.sequences, theirs)
    else:
        assert output.beam_indices.tolist() == expected.beam_indices.tolist()
        np.testing.assert_allclose(
            output.sequences_scores, expected.sequences_scores.numpy(), atol=1e-3
        )
