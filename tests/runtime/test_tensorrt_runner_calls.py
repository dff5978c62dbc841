"""How prompts and decode steps are split into calls that an engine's profiles and cache allow."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwen_runtime.backends.device_calls import (
    MAX_PADDING,
    CallLimits,
    PrefillRow,
    decode_spans,
    prefill_calls,
)

LIMITS = CallLimits(capacity=64, max_batch=4, max_sequence=16, max_num_logits=8)


def rows_of(*shapes: tuple[int, int, int, int]) -> list[PrefillRow]:
    """Rows from (slot, past, length, want)."""
    return [PrefillRow(index, *shape) for index, shape in enumerate(shapes)]


@st.composite
def prefill_cases(draw: st.DrawFn) -> tuple[list[PrefillRow], CallLimits]:
    capacity = draw(st.integers(1, 40))
    number = st.integers(1, 12)
    limits = CallLimits(capacity, draw(number), draw(number), draw(number))
    slots = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8, unique=True))
    rows = []
    for index, slot in enumerate(slots):
        length = draw(st.integers(1, capacity))
        past = draw(st.integers(0, capacity - length))
        rows.append(PrefillRow(index, slot, past, length, draw(st.integers(0, length))))
    return rows, limits


@given(prefill_cases())
def test_every_token_runs_once_in_order_within_all_limits(
    case: tuple[list[PrefillRow], CallLimits],
) -> None:
    rows, limits = case
    done = dict.fromkeys(range(len(rows)), 0)
    wanted: dict[int, list[int]] = {row.index: [] for row in rows}
    for call in prefill_calls(rows, limits):
        slots = [chunk.row.slot for chunk in call.chunks]
        assert slots == list(range(call.first_slot, call.first_slot + len(slots)))
        assert len(slots) <= limits.max_batch
        assert 1 <= call.sequence <= limits.max_sequence
        assert 1 <= call.num_logits <= limits.max_num_logits
        for chunk in call.chunks:
            assert chunk.start == done[chunk.row.index]
            assert 1 <= chunk.length <= call.sequence
            assert chunk.past + call.sequence <= limits.capacity
            done[chunk.row.index] = chunk.stop
            wanted[chunk.row.index] += [chunk.start + position for position in chunk.wanted]
    assert done == {row.index: row.length for row in rows}
    for row in rows:
        assert wanted[row.index] == list(range(row.length - row.want, row.length))


def test_prompts_in_neighbouring_slots_share_a_call() -> None:
    calls = list(prefill_calls(rows_of((2, 0, 9, 1), (0, 0, 7, 1), (1, 0, 8, 1)), LIMITS))

    assert [(call.first_slot, len(call.chunks), call.sequence) for call in calls] == [(0, 3, 9)]


def test_a_gap_between_slots_splits_a_call() -> None:
    calls = list(prefill_calls(rows_of((0, 0, 5, 1), (2, 0, 5, 1)), LIMITS))

    assert [call.first_slot for call in calls] == [0, 2]


def test_a_short_prompt_is_not_padded_to_a_long_one() -> None:
    calls = list(prefill_calls(rows_of((0, 0, 16, 1), (1, 0, 1, 1), (2, 0, 1, 1)), LIMITS))

    assert [call.sequence for call in calls] == [16, 1]
    for call in calls:
        computed = call.sequence * len(call.chunks)
        assert computed <= MAX_PADDING * sum(chunk.length for chunk in call.chunks)


def test_a_row_near_the_end_of_its_slot_is_not_padded_past_it() -> None:
    # Padded to 8 tokens the second row would end at 66 of 64.
    calls = list(prefill_calls(rows_of((0, 0, 8, 1), (1, 58, 6, 1)), LIMITS))

    assert [call.sequence for call in calls] == [8, 6]


def test_more_wanted_logits_than_a_call_brings_make_shorter_chunks() -> None:
    calls = list(prefill_calls(rows_of((0, 0, 14, 10)), LIMITS))

    assert [(call.sequence, call.num_logits) for call in calls] == [(12, 8), (2, 2)]


def test_idle_slots_between_running_ones_run_along() -> None:
    lengths = np.array([3, 5, 0, 7], np.int64)

    assert list(decode_spans([0, 3], lengths, LIMITS)) == [(0, 4)]


def test_a_full_idle_slot_splits_a_decode_call() -> None:
    lengths = np.array([3, 64, 0, 7], np.int64)

    assert list(decode_spans([0, 3], lengths, LIMITS)) == [(0, 1), (3, 1)]


@given(
    st.lists(st.integers(0, 20), min_size=1, unique=True),
    st.lists(st.sampled_from([0, 5, 64]), min_size=21, max_size=21),
    st.integers(1, 6),
)
def test_every_running_slot_is_in_one_span_and_no_full_idle_one(
    slots: list[int], held: list[int], max_batch: int
) -> None:
    lengths = np.array(held, np.int64)
    lengths[slots] = 1
    spans = list(decode_spans(sorted(slots), lengths, CallLimits(64, max_batch, 1, 1)))

    covered = [slot for first, rows in spans for slot in range(first, first + rows)]
    assert set(slots) <= set(covered)
    assert len(covered) == len(set(covered))
    assert all(rows <= max_batch for _, rows in spans)
    assert (lengths[covered] < 64).all()
