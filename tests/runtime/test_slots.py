"""Slots: handed out once, taken back once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_runtime.engine import SlotManager


def test_lowest_free_slots_are_handed_out_first() -> None:
    slots = SlotManager()
    assert slots.allocate(3) == [0, 1, 2]

    slots.release([1])

    assert slots.allocate(2) == [1, 3]
    assert (slots.num_slots, slots.num_used) == (4, 4)


@pytest.mark.parametrize(
    ("count", "taken"),
    [(1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), (5, [*range(5)])],
)
def test_slots_that_keep_something_are_taken_last_and_before_there_are_more_than_room(
    count: int, taken: list[int]
) -> None:
    assert SlotManager().allocate(count, kept=[2, 1], room=4) == taken


def test_new_slot_is_taken_beside_used_and_kept_ones_when_there_is_room() -> None:
    slots = SlotManager()
    slots.allocate(1)

    assert slots.allocate(1, kept=[1], room=3) == [2]
    assert slots.allocate(1, kept=[1], room=3) == [1]
    assert slots.allocate(1, kept=[], room=3) == [3]
    assert slots.used == [0, 1, 2, 3]


@pytest.mark.parametrize("released", [[0, 0], [5], [0, 5]])
def test_slot_that_is_not_in_use_cannot_be_released(released: list[int]) -> None:
    slots = SlotManager()
    slots.allocate(2)

    with pytest.raises(AssertionError, match="released slots"):
        slots.release(released)
    assert slots.num_used == 2


def test_released_slot_cannot_be_released_again() -> None:
    slots = SlotManager()
    held = slots.allocate(2)
    slots.release(held)

    with pytest.raises(AssertionError, match="released slots"):
        slots.release(held)


def test_slot_can_be_taken_by_its_number_when_it_is_free() -> None:
    slots = SlotManager()
    slots.allocate(2)
    slots.take(5)
    assert (slots.num_slots, slots.used) == (6, [0, 1, 5])
    assert slots.empty(8, kept=[3]) == [2, 4, 6, 7]

    with pytest.raises(AssertionError, match="took slot 5"):
        slots.take(5)
    slots.release([5])
    assert (slots.num_slots, slots.used) == (2, [0, 1])


@given(
    st.lists(st.tuples(st.sampled_from(["take", "give", "move"]), st.integers(0, 6)), max_size=60)
)
def test_no_slot_is_held_twice_and_none_is_lost(actions: list[tuple[str, int]]) -> None:
    slots = SlotManager()
    held: list[list[int]] = []
    before = 0

    for action, number in actions:
        if action == "take":
            held.append(slots.allocate(number))
        elif action == "give" and held:
            slots.release(held.pop(number % len(held)))
        elif action == "move" and any(held):
            row = held[number % len(held)]
            empty = slots.empty(slots.num_slots)
            if row and empty:
                slots.take(empty[0])
                slots.release([row[0]])
                row[0] = empty[0]
        used = [slot for taken in held for slot in taken]
        assert len(used) == len(set(used)) == slots.num_used
        assert sorted(used) == slots.used
        # No room is asked for beyond the highest slot in use, and nothing grows without need.
        assert slots.num_slots == max(used, default=-1) + 1
        assert action == "take" or slots.num_slots <= before
        before = slots.num_slots

    for taken in held:
        slots.release(taken)
    assert slots.num_used == 0
