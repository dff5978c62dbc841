"""Which cache slots are free. Knows no backend."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["SlotManager"]


class SlotManager:
    """Hands out cache slots, lowest first, so that those in use lie close together."""

    def __init__(self) -> None:
        self._free: list[int] = []
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

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` free slots, adding new ones where too few are free."""
        missing = count - len(self._free)
        if missing > 0:
            self._free.extend(range(self._num_slots, self._num_slots + missing))
            self._num_slots += missing
        taken, self._free = self._free[:count], self._free[count:]
        self._used.update(taken)
        return taken

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
        self._free = sorted(slot for slot in (*self._free, *slots) if slot < self._num_slots)
