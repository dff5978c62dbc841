"""What a step brings of its rows' logits: as little as all of them can do with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_doubles import CountingRunner

from qwen_runtime.backends.base import Limits, TopLogits
from qwen_runtime.engine.choosing import Chooser
from qwen_runtime.engine.models import Model, RowFeed
from qwen_runtime.generation.base import Feed, TokenChoice
from qwen_runtime.generation.prompts import PromptBatch
from qwen_runtime.generation.sample import SampleDecoding
from qwen_runtime.generation_config import GenerationConfig, resolve


class Searching:
    """Brings the three highest of given logits."""

    num_top = 3
    has_argmax = True

    def __init__(self, rows: Any) -> None:
        self.rows = np.asarray(rows, np.float32)
        self.limits = Limits(self.rows.shape[1], 100)
        self.calls: list[str] = []

    def decode_argmax(self, slots: Any, tokens: Any) -> Any:
        self.calls.append("argmax")
        return self.rows[slots].argmax(-1)

    def decode_top(self, slots: Any, tokens: Any) -> TopLogits:
        self.calls.append("top")
        rows = self.rows[slots]
        order = np.argsort(-rows, kind="stable")[:, :3]
        return TopLogits(rows.argmax(-1), np.take_along_axis(rows, order, -1), order)

    def whole_logits(self, slots: Any) -> Any:
        self.calls.append(f"whole {list(slots)}")
        return self.rows[slots]


def taking(answer: bool, num_top: int = 2) -> TokenChoice:
    return TokenChoice(num_top=num_top, take=lambda logits, tokens: answer)


@pytest.mark.parametrize(
    ("choices", "calls", "widths"),
    [
        ([TokenChoice(), TokenChoice()], ["argmax"], [0, 0]),
        ([TokenChoice(), taking(True)], ["top"], [0, 0]),
        ([taking(False), taking(True)], ["top", "whole [1]"], [5, 0]),
        ([taking(False), taking(False)], ["top", "whole [1, 0]"], [5, 5]),
        ([taking(True), taking(True, 3)], [], None),
        ([TokenChoice(), None], [], None),
    ],
)
def test_a_step_brings_as_little_as_its_rows_need(
    choices: list[TokenChoice | None], calls: list[str], widths: list[int] | None
) -> None:
    runner = Searching([[0, 1, 2, 3, 4], [4, 3, 9, 1, 0]])
    made: Any = runner
    found = Chooser(made).decode([1, 0], [7, 8], choices)

    assert runner.calls == calls
    assert (None if found is None else [values.shape[1] for values in found]) == widths
    if found is not None and choices[0] is not None and choices[0].take is None:
        assert choices[0].token == 2


class Overwriting(CountingRunner):
    """Brings all logits of a row in memory that its next call writes to."""

    num_top = 3

    def __init__(self) -> None:
        super().__init__()
        self.memory = np.zeros((1, 16), np.float32)

    def decode_top(self, slots: Any, tokens: Any) -> TopLogits:
        self.memory[:] = super().decode(slots, tokens)
        return TopLogits(self.memory.argmax(-1), self.memory[:, :3], np.arange(3)[None])

    def whole_logits(self, slots: Any) -> Any:
        return self.memory


def test_logits_of_a_refused_row_outlive_the_next_call_of_another_engine() -> None:
    model = Model(Overwriting())
    (ours,), (theirs,) = model.allocate(1), model.borrow(1)
    feed = Feed(0, np.array([5]), past=0, want=1, choice=taking(False))

    (result,) = model.run([RowFeed([ours], feed)], decode=True)
    assert result.logits is not None
    before = result.logits.copy()
    model.run([RowFeed([theirs], Feed(0, np.array([9]), 0, 1, taking(False)))], decode=True)

    np.testing.assert_array_equal(result.logits, before)


@pytest.mark.parametrize("penalty", [1.0, 1.1])
def test_a_step_that_is_run_again_after_an_interruption_counts_as_it_ran_last(
    penalty: float,
) -> None:
    settings = {"max_new_tokens": 4, "repetition_penalty": penalty}
    config = resolve(None, GenerationConfig(), settings, prompt_length=1, vocab_size=8)
    decoding = SampleDecoding(PromptBatch.single([1], 8), config)
    decoding.next_step()
    decoding.accept([np.eye(8, dtype=np.float32)[2:3]])
    choice = decoding.next_step().feeds[0].choice
    assert choice is not None
    if choice.take is None:
        choice.token = 7
    else:
        assert choice.take(np.array([9, 1], np.float32), np.array([7, 3]))

    decoding.accept([np.eye(8, dtype=np.float32)[4:5]])

    assert decoding.rows[0].token_ids == [2, 4]
