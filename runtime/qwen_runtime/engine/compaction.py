"""Which running rows move, so that they lie together. Knows no backend."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from itertools import pairwise

__all__ = ["IDLE_ROW_TOKENS", "MAX_GAP", "MOVED_TOKENS", "Compactor"]

IDLE_ROW_TOKENS = 256
"""Tokens whose copy costs no more than an idle row of one step. With the shape of Qwen2.5-0.5B in
int8 on two cores a row costs as much as 1,500 tokens; with the caches of Qwen3-0.6B, nine times as
large, as 250."""

MAX_GAP = 8
"""Idle rows that a gap costs at most: a runner makes two calls where there are more."""

MOVED_TOKENS = 1024
"""Tokens that move between two steps, or half of what the step's rows hold where that is more. It
bounds what a move adds to the time between two tokens: a step reads all that its rows hold."""


class Compactor:
    """Has the rows of decode steps move next to each other, where that costs less than it saves.

    A runner runs neighbouring slots in one call, idle ones between them included, and where rows
    end without new ones coming, those that stay lie scattered. Nobody knows how long they stay.
    So a row moves once steps have lost as much by idle rows as its copy costs: what is spent is
    never more than what was lost.
    """

    def __init__(self) -> None:
        self._lost = 0
        self._stuck: tuple[list[int], Sequence[int]] | None = None

    def due(self, rows: Mapping[int, int]) -> bool:
        """Count what a step loses by idle rows.

        Args:
            rows: The slots that it runs, at least one, and the tokens that each holds.

        Returns:
            Whether enough was lost for a row to move.
        """
        if max(rows) - min(rows) + 1 == len(rows):
            self._lost = 0
            return False
        self._lost += _idle_rows(rows) * IDLE_ROW_TOKENS
        return self._lost >= min(rows.values())

    def moves(self, rows: Mapping[int, int], empty: Sequence[int]) -> list[tuple[int, int]]:
        """Choose moves towards the layout with the fewest idle rows, of several the nearest one.

        Args:
            rows: As of `due`.
            empty: Slots that are free, have buffers and hold nothing of worth; ascending.

        Returns:
            Slots of rows and the slots to move them to, in ``empty``; each is in one move at most.
        """
        held = sorted(rows)
        room = max(MOVED_TOKENS, sum(rows.values()) // 2)
        movable = {slot for slot in held if rows[slot] <= room}
        chosen = None
        if self._stuck != (held, empty):
            chosen = _layout(rows, movable, empty)
        if chosen is None:
            self._stuck, self._lost = (held, empty), 0
            return []
        stay = sorted(chosen & movable) or sorted(chosen)
        middle = stay[len(stay) // 2]
        # From the ends inwards and from the middle outwards: each move leaves fewer gaps.
        sources = sorted(movable - chosen, key=lambda slot: -abs(slot - middle))
        targets = sorted(chosen - movable, key=lambda slot: abs(slot - middle))
        moves = []
        for source, target in zip(sources, targets, strict=True):
            room -= rows[source]
            if room < 0 or self._lost < rows[source]:
                break
            self._lost -= rows[source]
            moves.append((source, target))
        return moves


def _layout(rows: Mapping[int, int], movable: Set[int], empty: Sequence[int]) -> Set[int] | None:
    """Slots for the movable rows with the fewest idle ones and, of several such, the least to copy.

    Returns:
        As many slots as movable rows; None where no others are better than those they have.
    """
    places, fixed = sorted([*movable, *empty]), rows.keys() - movable
    best, least = None, (_idle_rows(rows), 0)
    for first in range(len(places) - len(movable) + 1):
        chosen = set(places[first : first + len(movable)])
        cost = (_idle_rows(chosen | fixed), sum(rows[slot] for slot in movable - chosen))
        if cost[0] < least[0] or (best is not None and cost < least):
            best, least = chosen, cost
    return best


def _idle_rows(slots: Collection[int]) -> int:
    """What the gaps between slots cost a step, in rows."""
    return sum(min(after - before - 1, MAX_GAP) for before, after in pairwise(sorted(slots)))
