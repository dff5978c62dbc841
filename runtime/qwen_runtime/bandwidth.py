"""How fast this machine reads memory: the ceiling of decoding, which reads every weight."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_runtime.errors import CapacityError
from qwen_runtime.sampling.checks import check_int

__all__ = ["available_threads", "cache_bytes", "read_bandwidth"]

_MIN_BYTES = 512 << 20
"""At least so much is read in a pass: far more than a desktop's caches hold."""
_TIMES_CACHES = 4
"""A pass reads so many times what the last-level caches hold, so that nearly all comes from
memory."""
_SHARE = 32 << 20
"""Bytes a thread reads in one timed piece: a few milliseconds, so that even on a busy machine some
pieces run undisturbed."""
_PASSES = 20
_CACHES = Path("/sys/devices/system/cpu")


def available_threads() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_bandwidth(threads: int | None = None) -> float:
    """Measure how fast this machine reads memory.

    Threads together read an array of at least 512 MiB, and of four times the caches, with NumPy's
    bitwise-or reduction, which loads every byte once, stores nothing and holds no lock. They pass
    over it twenty times, piece by piece (32 MiB each), and the fastest piece counts: other work on
    the machine can only slow it down. Takes about a second; the array is released afterwards.

    Args:
        threads: Threads that read; None for one per CPU that this process may use.

    Returns:
        Bytes per second, all threads together.

    Raises:
        RequestError: If ``threads`` is no whole number of at least 1.
        CapacityError: If there is no memory for the array.
    """
    if threads is None:
        threads = available_threads()
    check_int(threads, name="threads", minimum=1)
    piece = threads * _SHARE
    size = max(_MIN_BYTES, _TIMES_CACHES * cache_bytes())
    size = -(-size // piece) * piece
    try:
        array = np.ones(size // 8, np.int64)  # written: untouched pages would not be read
    except MemoryError as error:
        raise CapacityError(
            f"measuring the read bandwidth needs {size >> 20} MiB of memory, which is more than "
            "there is; free some"
        ) from error
    shares = array.reshape(-1, threads, _SHARE // 8)
    with ThreadPoolExecutor(threads) as pool:
        seconds = min(_read(pool, each) for _ in range(_PASSES) for each in shares)
    return piece / seconds


def _read(pool: ThreadPoolExecutor, piece: npt.NDArray[np.int64]) -> float:
    """Seconds in which each thread reads one row of [threads, words]."""
    started = time.perf_counter()
    for _ in pool.map(np.bitwise_or.reduce, piece):
        pass
    return time.perf_counter() - started


def cache_bytes() -> int:
    """Bytes of the last-level caches of all CPUs; 0 where the system does not tell."""
    caches: dict[str, int] = {}
    for cpu in _CACHES.glob("cpu[0-9]*"):
        found = max(
            ((_cache_bytes(index), index) for index in cpu.glob("cache/index*")), default=None
        )
        if found is not None:
            shared = (found[1] / "shared_cpu_list").read_text().strip()
            caches[shared] = found[0]
    return sum(caches.values())


def _cache_bytes(index: Path) -> int:
    text = (index / "size").read_text().strip()
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text.rstrip("KMG")) * units.get(text[-1], 1)
