"""`LLM.generate`: settings and their precedence, ends, outputs, callbacks."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import LLM, BackendError, GenerationConfig, RequestError
from qwen_runtime.generation_config import GenerationConfigWarning

PROMPT = [5, 17, 99, 42, 7]
# The greedy continuation of PROMPT by the small model, as transformers recorded it.
GREEDY = [44, 83, 23, 107, 44, 18, 113, 20, 107, 25, 25, 25, 127, 64]


@pytest.fixture
def llm_with_settings(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> Iterator[Callable[[dict[str, Any]], LLM]]:
    """The small model with another generation_config.json."""
    opened: list[LLM] = []

    def make(settings: dict[str, Any]) -> LLM:
        folder = Path(shutil.copytree(golden_bundle("qwen2_untied"), tmp_path / str(len(opened))))
        text = json.dumps(settings)
        (folder / "generation_config.json").write_text(text)
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        manifest["files"]["generation_config.json"]["num_bytes"] = len(text)
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        opened.append(LLM(folder))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def ids(llm: LLM, *args: Any, **kwargs: Any) -> list[int]:
    tokens: list[int] = llm.generate(PROMPT, *args, **kwargs).token_ids
    return tokens


def test_bundles_settings_apply_where_nothing_else_is_said(
    llm_with_settings: Callable[[dict[str, Any]], LLM],
) -> None:
    llm = llm_with_settings({"eos_token_id": [20, 113], "max_new_tokens": 9, "top_k": 7})

    output = llm.generate(PROMPT)

    assert output.token_ids == GREEDY[:7]
    assert (output.finish_reason, output.stop_reason) == ("stop", 113)


def test_keyword_wins_over_object_over_bundle(
    llm_with_settings: Callable[[dict[str, Any]], LLM],
) -> None:
    llm = llm_with_settings({"max_new_tokens": 9})

    assert ids(llm) == GREEDY[:9]
    assert ids(llm, GenerationConfig(max_new_tokens=5)) == GREEDY[:5]
    assert ids(llm, GenerationConfig(max_new_tokens=5), max_new_tokens=3) == GREEDY[:3]


def test_none_inherits_in_an_object_and_switches_off_as_a_keyword(
    llm_with_settings: Callable[[dict[str, Any]], LLM],
) -> None:
    llm = llm_with_settings({"eos_token_id": 113, "repetition_penalty": 1.3, "max_new_tokens": 9})
    plain = GREEDY[:7]

    penalised = ids(llm)
    assert penalised != plain
    assert ids(llm, GenerationConfig(repetition_penalty=None)) == penalised
    assert ids(llm, GenerationConfig(repetition_penalty=1.0)) == plain
    assert ids(llm, repetition_penalty=None) == plain
    assert ids(llm, repetition_penalty=None, eos_token_id=None) == GREEDY[:9]
    assert ids(llm, GenerationConfig(eos_token_id=None, repetition_penalty=1.0)) == plain


def test_top_k_default_of_50_is_switched_off_by_none_only(tiny_llm: LLM) -> None:
    def kept(**arguments: Any) -> int:
        output = tiny_llm.generate(
            PROMPT,
            do_sample=True,
            seed=0,
            max_new_tokens=1,
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )
        return int(np.isfinite(output.scores[0]).sum())

    assert kept() == 50
    assert kept(generation_config=GenerationConfig(top_k=None)) == 50
    assert kept(top_k=None) == 128
    assert kept(top_k=3) == 3


def test_any_end_token_of_a_list_stops(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(PROMPT, max_new_tokens=14, eos_token_id=[127, 20, 18])

    assert output.token_ids == GREEDY[:6]
    assert (output.finish_reason, output.stop_reason) == ("stop", 18)


def test_end_token_as_the_last_allowed_token_is_a_stop(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(PROMPT, max_new_tokens=6, eos_token_id=18)

    assert (output.token_ids, output.finish_reason) == (GREEDY[:6], "stop")


def test_length_is_the_reason_where_nothing_else_ended_it(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(PROMPT, max_new_tokens=6)

    assert (output.token_ids, output.finish_reason) == (GREEDY[:6], "length")
    assert output.stop_reason is None


def test_max_length_counts_the_prompt_and_max_new_tokens_wins(tiny_llm: LLM) -> None:
    assert ids(tiny_llm, max_length=9) == GREEDY[:4]
    with pytest.warns(GenerationConfigWarning, match="max_new_tokens wins"):
        assert ids(tiny_llm, max_length=9, max_new_tokens=6) == GREEDY[:6]
    with pytest.warns(GenerationConfigWarning, match="default max_length=25"):
        assert ids(tiny_llm)[:14] == GREEDY


def test_max_length_counts_padding_in_a_batch(tiny_llm: LLM) -> None:
    padded = [[0, 0, *PROMPT]]
    mask = [[0, 0, 1, 1, 1, 1, 1]]

    output = tiny_llm.generate(input_ids=padded, attention_mask=mask, max_length=9)

    assert output.sequences.tolist() == [[0, 0, *PROMPT, *GREEDY[:2]]]


def test_no_time_gives_one_token(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(PROMPT, max_new_tokens=14, max_time=0.0)

    assert (output.token_ids, output.finish_reason) == (GREEDY[:1], "length")


def test_stop_strings_keep_the_string_and_stop_cuts_it(text_llm: LLM) -> None:
    plain = text_llm.generate("Hello", max_new_tokens=12, do_sample=False)
    word = plain.text[len(plain.text) // 2 :][:3]
    assert word.isprintable() or word

    kept = text_llm.generate("Hello", max_new_tokens=12, do_sample=False, stop_strings=word)
    cut = text_llm.generate("Hello", max_new_tokens=12, do_sample=False, stop=word)

    assert kept.token_ids == cut.token_ids == plain.token_ids[: len(kept.token_ids)]
    assert word in kept.text
    assert cut.text == plain.text[: plain.text.index(word)]
    assert (kept.stop_reason, kept.finish_reason) == (word, "stop")
    assert (cut.stop_reason, cut.finish_reason) == (word, "stop")


def test_special_tokens_are_in_the_ids_but_not_in_the_text(embedded_llm: LLM) -> None:
    output = embedded_llm.generate(
        [{"role": "user", "content": "What is 17 + 25?"}],
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=40,
    )

    assert output.text == "17 + 25 = 42"
    assert output.token_ids[-1] == 4095
    assert (output.finish_reason, output.stop_reason) == ("stop", 4095)


def test_logprobs_are_those_of_the_models_own_distribution(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(
        PROMPT,
        max_new_tokens=5,
        repetition_penalty=1.4,
        logprobs=True,
        top_logprobs=3,
        return_dict_in_generate=True,
        output_logits=True,
    )

    assert len(output.logprobs) == 5
    for entry, token, logits in zip(output.logprobs, output.token_ids, output.logits, strict=True):
        exact = logits.astype(np.float64)
        exact -= np.log(np.exp(exact).sum())
        best = np.argsort(-exact)[:3]
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(exact[token], abs=1e-5)
        assert [number for number, _ in entry.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in entry.top], exact[best], atol=1e-5)


def test_outputs_that_were_not_asked_for_are_none(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(PROMPT, max_new_tokens=2)

    assert (output.logprobs, output.scores, output.logits) == (None, None, None)


def test_seed_makes_sampling_repeatable_and_its_absence_does_not(tiny_llm: LLM) -> None:
    def sample(**arguments: Any) -> list[int]:
        return ids(tiny_llm, do_sample=True, top_k=0, max_new_tokens=20, **arguments)

    assert sample(seed=3) == sample(seed=3)
    assert sample(seed=3) != sample(seed=4)
    assert sample(seed=3, rng="torch") == sample(seed=3, rng="torch")
    assert sample(seed=3, rng="torch") != sample(seed=3)
    assert sample() != sample()


def test_returned_sequences_differ_and_the_first_is_that_of_one(tiny_llm: LLM) -> None:
    arguments: dict[str, Any] = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": 12,
        "seed": 9,
    }

    many = tiny_llm.generate(PROMPT, num_return_sequences=3, **arguments)

    assert len({tuple(output.token_ids) for output in many}) == 3
    assert many[0].token_ids == ids(tiny_llm, **arguments)
    flat = tiny_llm.generate([PROMPT, PROMPT[:3]], num_return_sequences=3, **arguments)
    assert flat[:3] == many
    assert [output.prompt_token_ids for output in flat[3:]] == [PROMPT[:3]] * 3


def test_processor_sees_prompt_and_scores_and_its_change_counts(tiny_llm: LLM) -> None:
    seen: list[tuple[list[list[int]], tuple[int, ...], Any]] = []

    def only_77(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append((input_ids.tolist(), scores.shape, scores.dtype))
        scores[:, :77] = scores[:, 78:] = -np.inf
        return scores

    output = tiny_llm.generate(PROMPT, max_new_tokens=2, logits_processor=[only_77])

    assert output.token_ids == [77, 77]
    assert seen == [
        ([PROMPT], (1, 128), np.float32),
        ([[*PROMPT, 77]], (1, 128), np.float32),
    ]


def test_processor_is_called_per_prompt_without_padding_but_on_the_padded_batch(
    tiny_llm: LLM,
) -> None:
    shapes: list[tuple[int, ...]] = []

    def watch(input_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        shapes.append(input_ids.shape)
        return scores

    arguments: dict[str, Any] = {"max_new_tokens": 1, "logits_processor": [watch]}
    tiny_llm.generate([PROMPT, PROMPT[:2]], **arguments)
    tiny_llm.generate(
        input_ids=[PROMPT, [0, 0, 0, 1, 2]],
        attention_mask=[[1] * 5, [0, 0, 0, 1, 1]],
        **arguments,
    )

    assert sorted(shapes[:2]) == [(1, 2), (1, 5)]
    assert shapes[2:] == [(2, 5)]


def test_criterion_stops_and_sees_scores_only_when_they_are_kept(tiny_llm: LLM) -> None:
    seen: list[Any] = []

    def after_three(input_ids: np.ndarray, scores: Any) -> bool:
        seen.append(scores)
        return input_ids.shape[1] >= len(PROMPT) + 3

    output = tiny_llm.generate(PROMPT, max_new_tokens=14, stopping_criteria=[after_three])
    assert (output.token_ids, output.finish_reason) == (GREEDY[:3], "stop")
    assert output.stop_reason is None
    assert seen == [None] * 3

    tiny_llm.generate(
        PROMPT,
        max_new_tokens=14,
        stopping_criteria=[after_three],
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert [len(scores) for scores in seen[3:]] == [1, 2, 3]


def test_prefix_function_gets_the_index_of_the_prompt_in_a_list(tiny_llm: LLM) -> None:
    def allow(index: int, prefix: np.ndarray) -> list[int]:
        return [10 + index]

    outputs = tiny_llm.generate(
        [PROMPT, PROMPT, PROMPT], max_new_tokens=2, prefix_allowed_tokens_fn=allow
    )

    assert [output.token_ids for output in outputs] == [[10, 10], [11, 11], [12, 12]]


def test_prompt_may_be_left_out_where_there_is_a_bos_token(tiny_llm: LLM) -> None:
    output = tiny_llm.generate(max_new_tokens=3, bos_token_id=1)

    assert output == tiny_llm.generate([1], max_new_tokens=3)
    with pytest.raises(ValueError, match="needs a prompt, or a bos_token_id"):
        tiny_llm.generate(max_new_tokens=3)


def test_streamer_gets_the_prompt_then_every_token(tiny_llm: LLM) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def put(self, value: np.ndarray) -> None:
            self.calls.append(value.tolist())

        def end(self) -> None:
            self.calls.append("end")

    recorder = Recorder()

    tiny_llm.generate(PROMPT, max_new_tokens=3, streamer=recorder)

    assert recorder.calls == [[PROMPT], *([[token]] for token in GREEDY[:3]), "end"]


def test_llm_is_a_context_manager(golden_bundle: Callable[[str], Path]) -> None:
    with LLM(golden_bundle("qwen2_untied"), threads=1) as llm:
        assert ids(llm, max_new_tokens=3) == GREEDY[:3]
    with pytest.raises(BackendError, match="the LLM is closed"):
        ids(llm, max_new_tokens=3)


@pytest.mark.parametrize("cancel", [True, False, "no", threading.Event])
def test_cancel_must_be_an_event(text_llm: LLM, cancel: Any) -> None:
    name = type(cancel).__name__
    for ask in (text_llm.generate, text_llm.stream):
        with pytest.raises(RequestError, match=f"must be a threading.Event, got {name}") as error:
            ask("Hello", max_new_tokens=2, cancel=cancel)
        assert error.value.param == "cancel"
    assert text_llm._engine.num_requests == 0


@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_top_logprobs_above_the_vocabulary_are_refused_in_every_mode(
    tiny_llm: LLM, mode: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match=r"at most 128 .the vocabulary., got 129") as error:
        ids(tiny_llm, max_new_tokens=2, logprobs=True, top_logprobs=129, **mode)
    assert error.value.param == "top_logprobs"


def test_room_of_a_large_request_is_given_back_with_the_next_small_one(tiny_llm: LLM) -> None:
    runner = tiny_llm._engine.model._runner
    tiny_llm.generate([PROMPT] * 12, max_new_tokens=2)
    assert runner.num_slots == 12

    ids(tiny_llm, max_new_tokens=2)

    assert runner.num_slots == 1
