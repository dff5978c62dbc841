"""The TensorRT runner on a device in memory: ONNX Runtime's numbers through buffers and graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_double import TensorRtDouble
from tensorrt_engines import add_engine, linked_bundle

from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.backends.tensorrt import TensorRtRunner
from qwen_runtime.backends.tensorrt import decoder as decoder_module
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import CapacityError

VOCAB = 128
SLOT_BYTES = 2 * 64 * 8 * 4  # 2 heads, 64 tokens of 8, float32
BUFFERS = 4  # 2 layers, key and value
Open = Callable[..., tuple[TensorRtRunner, TensorRtDouble]]


@pytest.fixture(scope="module")
def bundle(golden_bundle: Callable[[str], Path]) -> Bundle:
    return Bundle.open(golden_bundle("qwen2_untied"))


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Iterator[OnnxRuntimeRunner]:
    runner = OnnxRuntimeRunner(bundle, threads=1)
    runner.allocate(16, 64)
    yield runner
    runner.close()


@pytest.fixture
def open_engine(bundle: Bundle, tmp_path: Path) -> Iterator[Open]:
    """Opens a runner on a double; nothing may leak from it."""
    opened: list[tuple[TensorRtRunner, TensorRtDouble]] = []

    def open_one(
        device: dict[str, Any] | None = None, **engine: Any
    ) -> tuple[TensorRtRunner, TensorRtDouble]:
        linked = linked_bundle(bundle.path, tmp_path / f"bundle{len(opened)}")
        double = TensorRtDouble(**(device or {}))
        runner = TensorRtRunner(linked, add_engine(linked, **engine), double)
        opened.append((runner, double))
        return runner, double

    yield open_one
    for runner, double in opened:
        runner.close()
        assert double.leaks() == {}


def prompts(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length) for length in lengths]


def close(ours: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(ours - expected).max() <= tolerance * np.abs(expected).max())


def expected_steps(reference: OnnxRuntimeRunner, tokens: list[np.ndarray], steps: int) -> list:
    """The reference's logits for prompts in slots 0.. and greedy-free steps after them."""
    slots = range(len(tokens))
    found = [
        row.copy()
        for row in reference.prefill(slots, tokens, [0] * len(tokens), [1] * len(tokens))
    ]
    found += [reference.decode(slots, [step] * len(tokens)).copy() for step in range(steps)]
    return found


def ran(double: TensorRtDouble, then: int) -> list[tuple[int, tuple[int, ...]]]:
    """Profile and shape of every run since there were ``then``."""
    return [(profile, shape) for _, profile, shape in double.ran[then:]]


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("FLOAT", 1e-5), ("HALF", 0.02), ("BF16", 0.1)])
def test_prefill_and_decode_answer_like_onnx_runtime(
    open_engine: Open,
    reference: OnnxRuntimeRunner,
    separate: bool,
    dtype: str,
    tolerance: float,
) -> None:
    runner, double = open_engine(separate=separate, dtype=dtype)
    tokens = prompts(5, 30, 9, 40, 3)
    answers = []
    for each in (runner, reference):
        each.allocate(5, 1)
        found = [row.copy() for row in each.prefill(range(5), tokens, [0] * 5, [1, 30, 0, 12, 2])]
        found += [each.decode(range(5), [7] * 5).copy() for _ in range(4)]
        each.copy(1, 3, 20)
        found.append(each.decode([3, 0], [4, 5]).copy())
        each.truncate(1, 11)
        found.append(each.prefill([1], prompts(4), [11], [4])[0])
        answers.append(found)

    for ours, expected in zip(*answers, strict=True):
        assert ours.shape == expected.shape or not ours.size
        assert not ours.size or close(ours, expected, tolerance)
    graphs = {graph for graph, _, _ in double.ran}
    assert graphs == ({"prefill", "decode"} if separate else {"prefill"})


def test_caches_of_16_bits_are_rounded_which_the_comparison_sees(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, _ = open_engine(dtype="BF16")
    tokens = prompts(20)
    runner.allocate(1, 1)

    ours = runner.prefill([0], tokens, [0], [20])[0]

    assert not close(ours, reference.prefill([0], tokens, [0], [20])[0])


def test_a_prompt_longer_than_a_chunk_runs_in_chunks(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, double = open_engine(max_sequence=16)
    tokens = prompts(50)
    runner.allocate(1, 1)

    ours = runner.prefill([0], tokens, [0], [1])[0]

    assert [shape for _, shape in ran(double, 0)] == [(1, 16), (1, 16), (1, 16), (1, 2)]
    assert close(ours, reference.prefill([0], tokens, [0], [1])[0])


def test_logits_nobody_wants_are_not_copied(open_engine: Open) -> None:
    runner, double = open_engine()
    runner.allocate(1, 1)

    (logits,) = runner.prefill([0], prompts(40), [0], [0])

    assert logits.shape == (0, VOCAB)
    assert double.counts["to_host"] == 0


def test_rows_that_are_padded_answer_as_if_they_were_not(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, double = open_engine()
    tokens = prompts(9, 16, 12)
    runner.allocate(3, 1)

    ours = runner.prefill(range(3), tokens, [0] * 3, [1] * 3)
    step = runner.decode(range(3), [1, 2, 3]).copy()

    assert ran(double, 0)[0] == (0, (3, 16))
    expected = reference.prefill(range(3), tokens, [0] * 3, [1] * 3)
    assert all(close(a, b) for a, b in zip(ours, expected, strict=True))
    # What padding wrote behind the shorter rows is never looked at.
    assert close(step, reference.decode(range(3), [1, 2, 3]))


def test_a_slot_can_be_filled_to_its_last_token(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, _ = open_engine()
    tokens = prompts(8, 62)
    runner.allocate(2, 64)
    answers = expected_steps(runner, tokens, 2), expected_steps(reference, tokens, 2)

    assert all(close(a, b) for a, b in zip(*answers, strict=True))
    with pytest.raises(CapacityError, match=r"at most 64 tokens .*tensorrt-rtx.*, got 65"):
        runner.decode([1], [0])


# --- memory -------------------------------------------------------------------------------------


def test_one_scratch_buffer_of_the_larger_profile_serves_all_contexts(open_engine: Open) -> None:
    runner, double = open_engine()
    runner.allocate(1, 1)

    contexts = list(double.contexts.values())
    assert [(context.profile, context.fixed_shape) for context in contexts] == [
        (0, False),
        (1, True),
    ]
    assert len({context.scratch for context in contexts}) == 1
    assert contexts[0].scratch[1] == 8192


def test_caches_take_their_shape_and_grow_by_slots_only(open_engine: Open) -> None:
    runner, double = open_engine()
    before = runner.device_bytes

    runner.allocate(1, 10)
    held = double.leaks()
    runner.allocate(2, 10)
    assert double.leaks() == held
    assert (runner.num_slots, runner.capacity) == (2, 64)
    assert runner.cache_bytes == runner.device_bytes - before == BUFFERS * 2 * SLOT_BYTES

    runner.allocate(1, 64)
    runner.grow(60)
    assert runner.cache_bytes == BUFFERS * 2 * SLOT_BYTES


def test_slots_keep_their_tokens_when_there_are_more(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, _ = open_engine()
    tokens = prompts(5, 9, 7)
    for each in (runner, reference):
        each.allocate(2, 1)
        each.prefill([0, 1], tokens[:2], [0, 0], [1, 1])
    for _ in range(3):
        runner.decode([0, 1], [1, 2])  # captured, with addresses that are about to change
        reference.decode([0, 1], [1, 2])
    assert runner.num_graphs == 1

    runner.allocate(5, 1)

    assert runner.num_graphs == 0
    for each in (runner, reference):
        each.prefill([4], tokens[2:], [0], [1])
    for _ in range(3):
        ours = runner.decode([4, 0, 1], [3, 4, 5])
        assert close(ours, reference.decode([4, 0, 1], [3, 4, 5]))


def test_a_copy_takes_the_tokens_asked_for_and_no_more(open_engine: Open) -> None:
    runner, double = open_engine()
    runner.allocate(2, 1)
    runner.prefill([0], prompts(20), [0], [1])

    runner.copy(0, 1, 12)
    runner.copy(0, 0, 8)
    runner.copy(0, 1, 0)
    double.synchronise(next(iter(double.streams)))

    assert double.counts["on_device"] == BUFFERS * 2 * 12 * 8 * 4


# --- CUDA graphs --------------------------------------------------------------------------------


def test_a_step_is_captured_when_it_comes_again_and_then_launched(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, double = open_engine()
    tokens = prompts(5, 9)
    for each in (runner, reference):
        each.allocate(2, 1)
        each.prefill([0, 1], tokens, [0, 0], [1, 1])
    history = []
    for step in range(5):
        before = double.counts.copy()
        ours = runner.decode([0, 1], [step, step + 1]).copy()
        assert close(ours, reference.decode([0, 1], [step, step + 1]))
        spent = double.counts - before
        history.append(tuple(spent[name] for name in ("enqueue", "capture", "launch")))
        assert spent["synchronise"] == 1
        assert spent["to_host"] == 2 * VOCAB * 4
        assert spent["to_device"] == 2 * 2 * 8

    assert history == [(1, 0, 0), (2, 1, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1)]


def test_prefill_between_steps_leaves_graphs_valid(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, double = open_engine()
    tokens = prompts(5, 9, 7)
    for each in (runner, reference):
        each.allocate(3, 1)
        each.prefill([0, 1], tokens[:2], [0, 0], [1, 1])
        for step in range(3):
            each.decode([0, 1], [step, step])
        each.prefill([2], tokens[2:], [0], [1])
        each.copy(2, 0, 7)

    before = double.counts.copy()
    ours = runner.decode([0, 1], [3, 4]).copy()

    assert (double.counts - before)["launch"] == 1
    assert close(ours, reference.decode([0, 1], [3, 4]))


def test_several_spans_of_a_step_wait_once(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, double = open_engine(max_batch=2)
    tokens = prompts(3, 4, 5, 6, 7)
    for each in (runner, reference):
        each.allocate(5, 1)
        each.prefill(range(5), tokens, [0] * 5, [1] * 5)
    for step in range(4):
        then, before = len(double.ran), double.counts["synchronise"]
        ours = runner.decode([4, 2, 0, 1, 3], [step] * 5).copy()
        assert [shape for _, shape in ran(double, then)] == [(2, 1), (2, 1), (1, 1)]
        assert double.counts["synchronise"] == before + 1
        assert close(ours, reference.decode([4, 2, 0, 1, 3], [step] * 5))
    assert runner.num_graphs == 3


def test_graphs_are_bounded_and_the_one_unused_for_longest_goes(
    open_engine: Open, reference: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "MAX_GRAPHS", 2)
    runner, double = open_engine()
    tokens = prompts(3, 4, 5)
    for each in (runner, reference):
        each.allocate(3, 1)
        each.prefill(range(3), tokens, [0] * 3, [1] * 3)
    for slot in (0, 0, 1, 1, 0, 2, 2):
        assert close(runner.decode([slot], [5]), reference.decode([slot], [5]))

    assert runner.num_graphs == len(double.graphs) == 2
    assert len(double.contexts) == 4
    before = double.counts["launch"]
    runner.decode([0], [1])
    assert double.counts["launch"] == before + 1


def test_an_engine_that_cannot_be_captured_runs_plainly(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, double = open_engine(device={"capturable": False})
    tokens = prompts(6)
    answers = []
    for each in (runner, reference):
        each.allocate(1, 1)
        answers.append(expected_steps(each, tokens, 4))

    assert all(close(a, b) for a, b in zip(*answers, strict=True))
    assert runner.num_graphs == double.counts["capture"] == 0


def test_an_idle_slot_runs_along_and_keeps_what_it_holds(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, double = open_engine()
    tokens = prompts(4, 5, 6)
    for each in (runner, reference):
        each.allocate(3, 1)
        each.prefill(range(3), tokens, [0] * 3, [1] * 3)
    then = len(double.ran)

    assert close(runner.decode([0, 2], [1, 2]), reference.decode([0, 2], [1, 2]))
    assert ran(double, then) == [(1, (3, 1))]
    assert close(runner.decode([1], [3]), reference.decode([1], [3]))


def test_a_full_idle_slot_does_not_run_along(
    open_engine: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, double = open_engine()
    tokens = prompts(4, 64, 6)
    for each in (runner, reference):
        each.allocate(3, 1)
        each.prefill(range(3), tokens, [0] * 3, [1] * 3)
    then = len(double.ran)

    assert close(runner.decode([0, 2], [1, 2]), reference.decode([0, 2], [1, 2]))
    assert ran(double, then) == [(1, (1, 1)), (1, (1, 1))]


def test_closing_twice_is_fine_and_a_closed_runner_holds_nothing(open_engine: Open) -> None:
    runner, double = open_engine()
    runner.allocate(2, 1)
    runner.prefill([0], prompts(5), [0], [1])
    runner.copy(0, 1, 5)  # pending

    runner.close()
    runner.close()

    assert double.leaks() == {}
    assert runner.num_slots == runner.device_bytes == 0


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_calls_answers_like_onnx_runtime(
    open_engine: Open, reference: OnnxRuntimeRunner, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    runner, _ = open_engine(max_batch=3, max_sequence=8, max_num_logits=4, separate=seed % 2 == 0)
    held = np.zeros(5, np.int64)
    runner.allocate(5, 1)
    for slot in range(reference.num_slots):
        reference.truncate(slot, 0)
    for _ in range(40):
        count = int(rng.integers(1, 6))
        slots = rng.permutation(5)[:count].tolist()
        kind = rng.choice(["prefill", "decode", "copy", "truncate"], p=[0.3, 0.5, 0.1, 0.1])
        if kind == "copy":
            src, dst = rng.integers(0, 5, 2).tolist()
            held[dst] = rng.integers(0, held[src] + 1)
            for each in (runner, reference):
                each.copy(src, dst, int(held[dst]))
        elif kind == "truncate":
            held[slots] = rng.integers(0, held[slots] + 1)
            for each in (runner, reference):
                for slot in slots:
                    each.truncate(slot, int(held[slot]))
        elif kind == "decode":
            slots = [slot for slot in slots if held[slot] < 64]
            tokens = rng.integers(0, VOCAB, len(slots)).tolist()
            held[slots] += 1
            if slots:
                assert close(runner.decode(slots, tokens), reference.decode(slots, tokens))
        else:
            past = [int(rng.integers(0, min(held[slot], 40) + 1)) for slot in slots]
            rows = [rng.integers(0, VOCAB, int(rng.integers(1, 24))) for _ in slots]
            want = [int(rng.integers(0, len(row) + 1)) for row in rows]
            held[slots] = [p + len(row) for p, row in zip(past, rows, strict=True)]
            ours = runner.prefill(slots, rows, past, want)
            expected = reference.prefill(slots, rows, past, want)
            for mine, theirs, number in zip(ours, expected, want, strict=True):
                assert len(mine) == number
                assert not number or close(mine, theirs)
