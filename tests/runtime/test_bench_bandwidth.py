"""The measured read bandwidth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from qwen_runtime import bandwidth
from qwen_runtime.bandwidth import available_threads, cache_bytes, read_bandwidth
from qwen_runtime.errors import CapacityError, RequestError


def test_bandwidth_is_plausible_for_any_machine() -> None:
    assert 2e8 < read_bandwidth(1) < 1e13


def test_the_fastest_piece_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []

    def read(pool: object, piece: npt.NDArray[np.int64]) -> float:
        assert piece.shape[0] == 2  # a row for each thread
        assert (piece == 1).all()  # pages that were never written would not be read
        pieces.append(piece.nbytes)
        return 0.5 if len(pieces) == 7 else 1.0

    monkeypatch.setattr(bandwidth, "_PASSES", 1)
    monkeypatch.setattr(bandwidth, "_read", read)
    assert read_bandwidth(2) == pieces[0] / 0.5
    assert sum(pieces) >= max(512 << 20, 4 * cache_bytes())


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_threads_that_are_no_count_are_refused(threads: int) -> None:
    with pytest.raises(RequestError, match="threads must be an integer >= 1") as caught:
        read_bandwidth(threads)
    assert caught.value.param == "threads"


def test_an_array_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("numpy.ones", no_room)
    with pytest.raises(CapacityError, match=r"needs \d+ MiB of memory"):
        read_bandwidth()


def test_caches_that_cpus_share_count_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cpu, shared in enumerate(("0-1", "0-1", "2")):
        for index, size in enumerate(("32K", "1M", "16M")):
            folder = tmp_path / f"cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            (folder / "size").write_text(f"{size}\n")
            (folder / "shared_cpu_list").write_text(f"{shared}\n")
    (tmp_path / "cpu3").mkdir()  # tells nothing
    monkeypatch.setattr(bandwidth, "_CACHES", tmp_path)
    assert cache_bytes() == 2 * (16 << 20)


def test_at_least_one_thread_is_available() -> None:
    assert available_threads() >= 1
