"""The cache's buffers: growth keeps contents, views are the memory itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime import cache as cache_module
from qwen_runtime.cache import GROWTH_STEP, KVCache
from qwen_runtime.errors import CapacityError


def make(max_context: int = 1000) -> KVCache:
    return KVCache(
        ["0.key", "0.value"],
        num_key_value_heads=2,
        head_dim=4,
        dtype=np.float32,
        max_context=max_context,
    )


def fill(cache: KVCache, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    for _, view in cache.rows(0, cache.num_slots):
        view[:] = rng.standard_normal(view.shape)
    return {name: view.copy() for name, view in cache.rows(0, cache.num_slots)}


def test_new_cache_holds_nothing() -> None:
    cache = make()

    assert (cache.num_slots, cache.capacity, cache.num_bytes) == (0, 0, 0)


@pytest.mark.parametrize(
    ("asked", "capacity"), [(1, 256), (256, 256), (257, 512), (999, 1000), (1000, 1000)]
)
def test_capacity_is_a_multiple_of_the_step_or_the_limit(asked: int, capacity: int) -> None:
    assert GROWTH_STEP == 256
    cache = make()

    assert cache.reserve(1, asked)
    assert cache.capacity == capacity


def test_growing_in_both_directions_keeps_contents_and_lengths() -> None:
    cache = make()
    cache.reserve(2, 10)
    before = fill(cache)
    cache.lengths[:] = [7, 3]

    assert cache.reserve(5, 300)

    assert (cache.num_slots, cache.capacity) == (5, 512)
    assert cache.lengths.tolist() == [7, 3, 0, 0, 0]
    for name, view in cache.rows(0, 5):
        for slot, length in enumerate([7, 3, 0, 0, 0]):
            np.testing.assert_array_equal(
                view[slot, :, :length], before[name][slot % 2, :, :length]
            )
            assert not view[slot, :, length:].any(), "memory is taken for what is held alone"


def test_asking_for_less_changes_nothing() -> None:
    cache = make()
    cache.reserve(3, 300)
    cache.lengths[1] = 260
    addresses = [view.ctypes.data for _, view in cache.rows(0, 3)]

    assert not cache.reserve(1, 1)
    assert [view.ctypes.data for _, view in cache.rows(0, 3)] == addresses


def test_cache_that_holds_nothing_shrinks_to_what_is_asked_for() -> None:
    cache = make()
    cache.reserve(3, 1000)
    fill(cache)

    assert not cache.reserve(2, 900), "not much smaller"
    assert cache.reserve(1, 300)
    assert (cache.num_slots, cache.capacity, cache.lengths.tolist()) == (1, 512, [0])
    assert not any(view.any() for _, view in cache.rows(0, 1))


def test_cache_that_holds_little_shrinks_to_that_and_keeps_it() -> None:
    cache = make()
    cache.reserve(6, 1000)
    before = fill(cache)
    cache.lengths[:] = [9, 0, 300, 0, 0, 0]

    assert not cache.reserve(6, 600), "not much smaller"
    assert cache.reserve(1, 1)

    assert (cache.num_slots, cache.capacity, cache.lengths.tolist()) == (3, 512, [9, 0, 300])
    for name, view in cache.rows(0, 3):
        for slot, length in enumerate([9, 0, 300]):
            np.testing.assert_array_equal(view[slot, :, :length], before[name][slot, :, :length])
    assert not cache.reserve(1, 1)


def test_cache_is_as_before_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make()
    cache.reserve(2, 10)
    before = fill(cache)
    cache.lengths[:] = [7, 3]
    places = [view.ctypes.data for _, view in cache.rows(0, 2)]
    pages, calls = cache_module._pages, 0

    def full(*arguments: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return pages(*arguments)

    monkeypatch.setattr(cache_module, "_pages", full)

    with pytest.raises(CapacityError, match="5 rows of 512 tokens need 163840 bytes"):
        cache.reserve(5, 300)
    assert (cache.num_slots, cache.capacity, cache.lengths.tolist()) == (2, 256, [7, 3])
    assert [view.ctypes.data for _, view in cache.rows(0, 2)] == places
    for name, view in cache.rows(0, 2):
        np.testing.assert_array_equal(view, before[name])


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's figures of this process"
)
def test_memory_is_taken_for_tokens_that_are_held_not_for_buffers() -> None:
    def taken() -> int:
        status = Path("/proc/self/smaps_rollup").read_text("utf-8")
        return 1024 * int(status.split("Anonymous:")[1].split()[0])

    cache = KVCache(
        ["0.key", "0.value"],
        num_key_value_heads=2,
        head_dim=64,
        dtype=np.float32,
        max_context=8192,
    )
    before = taken()
    cache.reserve(16, 8192)
    for _, buffer in cache.rows(0, 16):
        buffer[:, :, :100] = 1
    assert taken() - before < cache.num_bytes / 16


def test_more_than_can_be_addressed_is_too_much_memory() -> None:
    with pytest.raises(CapacityError, match="rows of 256 tokens need"):
        make().reserve(2**60, 1)


def test_rows_are_contiguous_views() -> None:
    cache = make()
    cache.reserve(4, 10)

    for (_, view), (_, whole) in zip(cache.rows(1, 3), cache.rows(0, 4), strict=True):
        assert view.flags["C_CONTIGUOUS"]
        assert np.shares_memory(view, whole)
        assert view.shape == (2, 2, 256, 4)


def test_copy_takes_only_the_tokens_asked_for() -> None:
    cache = make()
    cache.reserve(3, 10)
    before = fill(cache)
    cache.lengths[:] = [9, 1, 5]

    cache.copy(0, 2, 6)

    assert cache.lengths.tolist() == [9, 1, 6]
    for name, view in cache.rows(0, 3):
        np.testing.assert_array_equal(view[2, :, :6], before[name][0, :, :6])
        np.testing.assert_array_equal(view[2, :, 6:], before[name][2, :, 6:])
        np.testing.assert_array_equal(view[:2], before[name][:2])


def test_more_than_the_limit_is_refused_with_both_numbers() -> None:
    cache = make(max_context=100)

    with pytest.raises(CapacityError, match=r"at most 100 tokens .*got 101"):
        cache.reserve(1, 101)
    assert cache.num_bytes == 0


def test_clear_releases_everything() -> None:
    cache = make()
    cache.reserve(2, 10)
    cache.clear()

    assert (cache.num_slots, cache.capacity, cache.num_bytes) == (0, 0, 0)
    assert cache.reserve(1, 10)
