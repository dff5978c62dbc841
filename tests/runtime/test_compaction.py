"""Which rows move: only where it pays, never far, and until nothing is gained by more."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_runtime.engine.compaction import IDLE_ROW_TOKENS, MAX_GAP, MOVED_TOKENS, Compactor


def idle_rows(slots: Collection[int]) -> int:
    return sum(min(after - before - 1, MAX_GAP) for before, after in pairwise(sorted(slots)))


def step(
    compactor: Compactor, rows: dict[int, int], empty: Collection[int]
) -> list[tuple[int, int]]:
    """The moves before a decode step."""
    return compactor.moves(rows, sorted(empty)) if rows and compactor.due(rows) else []


def settled(rows: dict[int, int], free: Collection[int], steps: int = 100) -> dict[int, int]:
    """Where rows are after so many steps."""
    compactor, rows, empty = Compactor(), dict(rows), set(free)
    for _ in range(steps):
        for source, target in step(compactor, rows, empty):
            rows[target] = rows.pop(source)
            empty = empty - {target} | {source}
    return rows


def test_rows_side_by_side_stay_where_they_are() -> None:
    assert settled({4: 9, 5: 8, 6: 7}, range(4)) == {4: 9, 5: 8, 6: 7}


def test_scattered_rows_lie_side_by_side_in_the_end_and_most_did_not_move() -> None:
    rows = dict.fromkeys([0, 3, 9, 10, 11, 13, 14, 15, 26, 31], 300)
    free = set(range(32)) - set(rows)

    after = settled(rows, free)

    assert sorted(after) == [*range(6, 16)]
    assert len(set(after) & set(rows)) == 6


def test_row_moves_once_as_much_was_lost_as_its_copy_costs() -> None:
    compactor, rows = Compactor(), {0: 900, 2: 900}
    moves = [step(compactor, rows, [1]) for _ in range(4)]

    assert moves == [[], [], [], [(2, 1)]]
    assert 3 * IDLE_ROW_TOKENS < 900 <= 4 * IDLE_ROW_TOKENS


def test_wide_gap_costs_no_more_than_a_second_call() -> None:
    compactor, rows = Compactor(), {0: 4000, 30: 4000}

    assert step(compactor, rows, range(1, 30)) == []
    assert step(compactor, rows, range(1, 30)) == [(30, 1)]
    assert MAX_GAP * IDLE_ROW_TOKENS < 4000 < 29 * IDLE_ROW_TOKENS


def test_second_row_moves_once_its_copy_is_paid_for_too() -> None:
    compactor, rows = Compactor(), dict.fromkeys([0, 2, 4, 6], 500)
    assert step(compactor, rows, [1, 3, 5]) == [(6, 1)]

    rows = dict.fromkeys([0, 1, 2, 4], 500)
    assert 500 <= 3 * IDLE_ROW_TOKENS < 2 * 500 <= 4 * IDLE_ROW_TOKENS
    assert step(compactor, rows, [3, 5, 6]) == [(4, 3)]


def test_what_was_lost_is_forgotten_once_rows_lie_side_by_side() -> None:
    compactor = Compactor()
    for _ in range(3):
        assert not step(compactor, {0: 900, 2: 900}, [1])
    assert not step(compactor, {0: 900}, [1, 2])

    assert not step(compactor, {0: 900, 2: 900}, [1])


def test_few_rows_move_between_two_steps() -> None:
    rows = dict.fromkeys(range(0, 32, 4), 300)
    compactor, empty = Compactor(), set(range(32)) - set(rows)
    compactor.due(rows)

    moves = step(compactor, rows, empty)

    assert len(moves) == 4, "half of what the step's rows hold, which is more than the least"
    few = {0: 300, 2: 300, 8: 300, 15: 300, 17: 300}
    compactor = Compactor()
    compactor.due(few)
    assert len(step(compactor, few, {9, 10, 11, 12, 13, 14})) == MOVED_TOKENS // 300


def test_row_longer_than_all_others_stays_and_they_come_to_it() -> None:
    rows = {3: 100, 8: 100, 11: 5000, 17: 100}

    after = settled(rows, set(range(20)) - set(rows))

    assert sorted(after) == [8, 9, 10, 11]
    assert after[11] == 5000


def test_row_that_is_too_long_to_move_does_not_keep_others_from_it() -> None:
    rows = {0: 5000, 3: 100, 6: 100, 9: 100}

    assert sorted(settled(rows, [4, 5, 7, 8])) == [0, 3, 4, 5]


def test_long_rows_move_when_others_are_as_long() -> None:
    rows = {0: 4000, 9: 4000, 18: 4100}

    after = settled(rows, set(range(20)) - set(rows))

    assert sorted(after) == [16, 17, 18]
    assert after[18] == 4100, "the longest stays"


@pytest.mark.parametrize(
    ("rows", "free", "after"),
    [
        ([1, 5, 6, 7], [3, 4, 8], [4, 5, 6, 7]),  # 0 and 2 are kept
        ([0, 2], [], [0, 2]),
        ([0, 2], [5], [0, 2]),
        ([0, 2], [3], [2, 3]),
    ],
)
def test_rows_move_around_slots_that_are_not_free(
    rows: list[int], free: list[int], after: list[int]
) -> None:
    assert sorted(settled(dict.fromkeys(rows, 20), free)) == after


def test_layout_that_cannot_get_better_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_runtime.engine import compaction

    looked = []
    layout = compaction._layout
    monkeypatch.setattr(compaction, "_layout", lambda *args: looked.append(1) or layout(*args))
    compactor = Compactor()
    for _ in range(5):
        assert step(compactor, {0: 20, 2: 20}, [7]) == []
    assert len(looked) == 1

    assert step(compactor, {0: 20, 2: 20}, [1, 7]) == [(2, 1)]


layouts = st.lists(st.sampled_from("rre.k"), max_size=40)
lengths = st.lists(st.one_of(st.integers(0, 400), st.integers(0, 9000)), min_size=40, max_size=40)


@given(layouts, lengths)
def test_moves_are_to_free_slots_paid_for_and_few_at_a_time(
    places: list[str], lengths: list[int]
) -> None:
    rows = {slot: lengths[slot] for slot, place in enumerate(places) if place == "r"}
    empty = {slot for slot, place in enumerate(places) if place == "e"}
    compactor, lost, before = Compactor(), 0, idle_rows(rows)
    held = sorted(rows.values())
    for _ in range(150):
        lost += idle_rows(rows) * IDLE_ROW_TOKENS
        moves = step(compactor, rows, empty)
        sources, targets = [source for source, _ in moves], [target for _, target in moves]
        assert len(set(sources)) == len(set(targets)) == len(moves)
        assert set(sources) <= set(rows)
        assert set(targets) <= empty
        moved = sum(rows[source] for source in sources)
        lost -= moved
        assert lost >= 0
        assert moved <= max(MOVED_TOKENS, sum(rows.values()) // 2)
        for source, target in moves:
            rows[target] = rows.pop(source)
            empty = empty - {target} | {source}
    assert sorted(rows.values()) == held
    assert idle_rows(rows) <= before


@given(st.lists(st.sampled_from("rrek"), max_size=9))
def test_no_other_layout_has_fewer_idle_rows_in_the_end(places: list[str]) -> None:
    rows = {slot: 30 for slot, place in enumerate(places) if place == "r"}
    free = [slot for slot, place in enumerate(places) if place == "e"]

    after = settled(rows, free)

    best = min(map(idle_rows, combinations(sorted([*rows, *free]), len(rows))))
    assert idle_rows(after) == best
    if idle_rows(rows) == best:
        assert after == rows
