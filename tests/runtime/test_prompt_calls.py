"""How prompts are cut into calls, and which rows share one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_runtime.backends.prompt_calls import cut, uniform_runs


@given(
    length=st.integers(1, 5000),
    limit=st.sampled_from([64, 512]),
    block=st.sampled_from([None, 16, 32]),
)
def test_cuts_are_even_and_leave_no_token_alone(
    length: int, limit: int, block: int | None
) -> None:
    calls = cut(length, limit, block)
    assert [start for start, _ in calls] == [0, *(stop for _, stop in calls[:-1])]
    assert calls[-1][1] == length
    sizes = [stop - start for start, stop in calls]
    assert all(start % 2 == 0 for start, _ in calls)
    assert max(sizes) <= limit
    assert min(sizes) >= min(2, length)
    if block is not None and length > 1:
        assert all(size % block != 1 for size in sizes)
    assert len(calls) <= -(-length // limit) + (block is not None)


@pytest.mark.parametrize(
    ("length", "sizes"), [(33, [30, 3]), (513, [510, 3]), (545, [512, 30, 3])]
)
def test_the_last_three_tokens_are_cut_off_where_one_would_be_alone(
    length: int, sizes: list[int]
) -> None:
    assert [stop - start for start, stop in cut(length, 512, 32)] == sizes
    whole = [stop - start for start, stop in cut(length, 512)]
    assert whole == ([510, 3] if length == 513 else [512, 33] if length == 545 else [33])


def runs(
    lengths: list[int], past: list[int], *, fused: bool, slots: list[int] | None = None
) -> list[list[int]]:
    rows = [np.zeros(length, np.int64) for length in lengths]
    chosen = slots or list(range(len(lengths)))
    block = 32 if fused else None
    return list(uniform_runs(chosen, rows, past, [1] * len(rows), 64, fused=fused, block=block))


def test_rows_with_a_past_share_a_call_unless_attention_is_fused() -> None:
    assert runs([6, 6, 6], [0, 0, 4], fused=False) == [[0, 1, 2]]
    assert runs([6, 6, 6], [0, 0, 4], fused=True) == [[0, 1], [2]]
    assert runs([6, 6, 6], [2, 2, 2], fused=True) == [[0], [1], [2]]
    assert runs([1, 1, 1], [2, 0, 9], fused=True) == [[0, 1, 2]]


def test_rows_that_would_be_cut_run_alone_where_attention_is_fused() -> None:
    assert runs([33, 33], [0, 0], fused=True) == [[0], [1]]
    assert runs([32, 32], [0, 0], fused=True) == [[0, 1]]


def test_rows_are_grouped_by_slot_length_and_number_of_tokens() -> None:
    assert runs([5, 5, 5], [0] * 3, fused=False, slots=[3, 0, 1]) == [[1, 2], [0]]
    assert runs([5, 4, 4], [0] * 3, fused=False) == [[0], [1, 2]]
    assert runs([30, 30, 30], [0] * 3, fused=False) == [[0, 1], [2]]
