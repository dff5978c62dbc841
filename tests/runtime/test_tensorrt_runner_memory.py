"""A TensorRT runner whose device fails: one error, nothing leaked, and what was there still there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorrt_double import TensorRtDouble
from tensorrt_engines import add_engine, linked_bundle

from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.backends.tensorrt import TensorRtRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError, CapacityError

PROMPT = np.arange(20)
CONTEXT = "could not create a context: out of memory"
OPENING = rf"needs 8192 bytes of scratch memory .*smaller --max-batch or --max-sequence|{CONTEXT}"
RUNNING = (
    "KV cache on the GPU, .*smaller --capacity|page-locked memory .*ask for fewer rows|"
    rf"no GPU memory left for a CUDA graph of \d rows .*ask for fewer rows|{CONTEXT}"
)


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    return linked_bundle(golden_bundle("qwen2_untied"), tmp_path / "bundle")


def use(runner: TensorRtRunner) -> list[np.ndarray]:
    """Something of everything: growing, prefill, plain and captured steps."""
    found = []
    for slots in (1, 3):
        runner.allocate(slots, 1)
        found += runner.prefill(range(slots), [PROMPT] * slots, [0] * slots, [1] * slots)
        found += [runner.decode(range(slots), [step] * slots).copy() for step in range(3)]
    return found


def test_running_out_of_memory_anywhere_is_one_error_and_leaks_nothing(bundle: Bundle) -> None:
    folder = add_engine(bundle)
    device = TensorRtDouble()
    runner = TensorRtRunner(bundle, folder, device)
    at_opening = device.counts["allocation"]
    expected = use(runner)
    runner.close()
    total = device.counts["allocation"]
    # Scratch, inputs and logits on both sides, two contexts; twice slots, a context and a graph.
    assert (at_opening, total) == (1 + 4 + 2, 7 + 2 * (2 + 4 + 2))

    for number in range(1, total + 1):
        failing = TensorRtDouble(fail_at=number)
        if number <= at_opening:
            with pytest.raises(BackendError, match=OPENING):
                TensorRtRunner(bundle, folder, failing)
            assert failing.leaks() == {}
            continue
        runner = TensorRtRunner(bundle, folder, failing)
        with pytest.raises((CapacityError, BackendError), match=RUNNING):
            use(runner)
        # Slots that were there still answer, and asking again finds room.
        if runner.num_slots:
            runner.decode([0], [1])
        again = use(runner)
        assert all(map(np.array_equal, again, expected))
        runner.close()
        assert failing.leaks() == {}


def test_slots_are_as_before_when_there_is_no_room_for_more(bundle: Bundle) -> None:
    device = TensorRtDouble(memory=200_000)
    runner = TensorRtRunner(bundle, add_engine(bundle), device)
    reference = OnnxRuntimeRunner(bundle, threads=1)
    for each in (runner, reference):
        each.allocate(2, 1)
        each.prefill([0, 1], [PROMPT, PROMPT[:7]], [0, 0], [1, 1])

    held = device.leaks()["host"]
    with pytest.raises(CapacityError, match=r"9 rows of 64 tokens need 147456 bytes of KV cache"):
        runner.allocate(9, 1)

    assert runner.num_slots == 2
    assert device.leaks()["host"] == held
    for _ in range(3):
        np.testing.assert_allclose(
            runner.decode([0, 1], [1, 2]), reference.decode([0, 1], [1, 2]), atol=1e-5
        )
    runner.close()
    reference.close()
    assert device.leaks() == {}


@pytest.mark.parametrize("number", range(1, 8))
def test_an_engine_that_fails_in_any_run_leaks_nothing(bundle: Bundle, number: int) -> None:
    device = TensorRtDouble(fail_enqueue_at=number)
    runner = TensorRtRunner(bundle, add_engine(bundle), device)

    with pytest.raises(BackendError, match="could not run the engine: an illegal memory access"):
        use(runner)

    # Nothing of the failed call is in the way of the next one.
    assert len(use(runner)) == 10
    runner.close()
    assert device.leaks() == {}


def test_a_step_that_fails_half_way_leaves_nothing_pending(bundle: Bundle) -> None:
    device = TensorRtDouble(fail_enqueue_at=4)
    runner = TensorRtRunner(bundle, add_engine(bundle, max_batch=2), device)
    runner.allocate(3, 1)
    runner.prefill([0, 1, 2], [PROMPT[:9]] * 3, [0] * 3, [1] * 3)

    with pytest.raises(BackendError, match="could not run the engine"):
        runner.decode([0, 1, 2], [1, 2, 3])

    assert device.ran[-1][2] == (2, 1)
    assert not any(device.streams.values())
    runner.close()
    assert device.leaks() == {}
