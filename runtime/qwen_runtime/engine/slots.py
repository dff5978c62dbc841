"""Which cache slots are free. Knows no backend."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["SlotManager"]


class SlotManager:
    """Hands out cache slots, lowest first, so that those in use lie close together."""

    def __init__(self) -> None:
        self._num_slots = 0
        self._used: set[int] = set()

    @property
    def num_slots(self) -> int:
        """The highest slot in use and one: what a runner must have allocated."""
        return self._num_slots

    @property
    def num_used(self) -> int:
        """Slots in use."""
        return len(self._used)

    @property
    def used(self) -> list[int]:
        """Slots in use, lowest first."""
        return sorted(self._used)

    def allocate(self, count: int, kept: Sequence[int] = (), room: int = 0) -> list[int]:
        """Take ``count`` free slots.

        Args:
            count: How many.
            kept: Free slots whose contents are worth something, the least first: taken before
                there are more than ``room`` slots, and after every other free one.
            room: Slots that there may be for the sake of kept ones.
        """
        empty = self.empty(max(self._num_slots, room), kept)
        taken = [*empty, *kept][:count]
        new = max([self._num_slots, room, *(slot + 1 for slot in kept)])
        taken += range(new, new + count - len(taken))
        self._used.update(taken)
        self._num_slots = max(self._used, default=-1) + 1
        return sorted(taken)

    def empty(self, room: int, kept: Sequence[int] = ()) -> list[int]:
        """Slots below ``room`` that are neither in use nor kept, lowest first."""
        return [slot for slot in range(room) if slot not in self._used and slot not in kept]

    def take(self, slot: int) -> None:
        """Take a certain free slot.

        Raises:
            AssertionError: If it is in use: a bug of ours.
        """
        if slot in self._used:
            raise AssertionError(f"took slot {slot} of {sorted(self._used)} in use")
        self._used.add(slot)
        self._num_slots = max(self._num_slots, slot + 1)

    def release(self, slots: Sequence[int]) -> None:
        """Give slots back.

        Raises:
            AssertionError: If one is not in use: a bug of ours.
        """
        if not self._used.issuperset(slots) or len(set(slots)) != len(slots):
            raise AssertionError(f"released slots {list(slots)} of {sorted(self._used)} in use")
        self._used.difference_update(slots)
        # Free slots at the end are forgotten: nobody has to have room for them any longer.
        self._num_slots = max(self._used, default=-1) + 1
