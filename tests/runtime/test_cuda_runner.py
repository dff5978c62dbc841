"""The CUDA runner on a device made of the host's memory, with the graphs that CUDA is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_double import HostSeam
from small_checkpoints import small_checkpoint
from tensorrt_engines import linked_bundle

from qwen_export.bundle import BuildOptions, build
from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_runtime.backends.cuda import CudaRunner
from qwen_runtime.backends.cuda import decoder as decoder_module
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError, CapacityError
from qwen_runtime.lowered_file import LoweredFolder

VOCAB = 128
TOKEN_BYTES = 8 * 4  # head_dim 8, float32
BUFFERS, HEADS = 4, 2  # 2 layers, key and value
Open = Callable[..., tuple[CudaRunner, HostSeam]]


def lowered_bundle(source: Path, target: Path, **options: Any) -> tuple[Bundle, LoweredFolder]:
    """A copy of a bundle with graphs for CUDA."""
    bundle = linked_bundle(source, target)
    options = {"compute_dtype": "fp32", "attention": "group_query"} | options
    return bundle, lower_bundle(bundle, "cuda", LoweringOptions(**options))


@pytest.fixture(scope="module")
def lowered(
    golden_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, LoweredFolder]:
    folder = tmp_path_factory.mktemp("cuda")
    return lowered_bundle(golden_bundle("qwen2_untied"), folder / "bundle")


@pytest.fixture(scope="module")
def reference(lowered: tuple[Bundle, LoweredFolder]) -> Iterator[OnnxRuntimeRunner]:
    runner = OnnxRuntimeRunner(lowered[0], threads=1)
    runner.allocate(40, 64)
    yield runner
    runner.close()


@pytest.fixture
def open_cuda(lowered: tuple[Bundle, LoweredFolder]) -> Iterator[Open]:
    """Opens a runner on a double; nothing may leak from it."""
    opened: list[tuple[CudaRunner, HostSeam]] = []

    def open_one(**device: Any) -> tuple[CudaRunner, HostSeam]:
        seam = HostSeam(**device)
        runner = CudaRunner(*lowered, seam)
        opened.append((runner, seam))
        return runner, seam

    yield open_one
    for runner, seam in opened:
        runner.close()
        assert seam.leaks() == {}


def prompts(*lengths: int, vocab: int = VOCAB) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length) for length in lengths]


def close(ours: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(ours - expected).max() <= tolerance * np.abs(expected).max())


def conversation(runner: Any, tokens: list[np.ndarray]) -> list[np.ndarray]:
    """Logits of prompts of five slots, steps, a copy, a truncation and a continued prompt."""
    runner.allocate(5, 1)
    found = [row.copy() for row in runner.prefill(range(5), tokens, [0] * 5, [1, 30, 1, 12, 2])]
    found += [runner.decode(range(5), [7] * 5).copy() for _ in range(4)]
    runner.copy(1, 3, 20)
    found.append(runner.decode([3, 0], [4, 5]).copy())
    runner.truncate(1, 11)
    found.append(runner.prefill([1], tokens[:1], [11], [4])[0])
    return found


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["group_query", "mask"])
@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_untied", "qwen2_sliding"])
def test_prefill_and_decode_answer_like_the_cpus_runner(
    golden_bundle: Callable[[str], Path], tmp_path: Path, name: str, attention: str
) -> None:
    bundle, folder = lowered_bundle(golden_bundle(name), tmp_path / "bundle", attention=attention)
    expected, ours = OnnxRuntimeRunner(bundle, threads=1), CudaRunner(bundle, folder, HostSeam())
    tokens = prompts(5, 30, 9, 40, 3)
    answers = [conversation(each, tokens) for each in (ours, expected)]
    ours.close()
    expected.close()

    for one, other in zip(*answers, strict=True):
        assert one.shape == other.shape
        assert close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "compute_dtype", "tied", "tolerance"),
    [
        ("int8", "fp32", True, 1e-5),
        ("int4", "fp32", False, 1e-5),
        ("int4", "fp16", True, 0.01),
        ("fp32", "fp16", False, 0.01),
    ],
)
def test_weights_arrive_in_the_graphs_own_form(
    tmp_path: Path, precision: str, compute_dtype: str, tied: bool, tolerance: float
) -> None:
    checkpoint = small_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=tied)
    options = BuildOptions(precision=precision, verify=False)
    bundle = Bundle.open(build(checkpoint, tmp_path / "bundle", options).path)
    lowering = LoweringOptions(compute_dtype=compute_dtype, attention="group_query")  # type: ignore[arg-type]  # parametrised
    folder = lower_bundle(bundle, "cuda", lowering)
    expected = OnnxRuntimeRunner(bundle, threads=1, exact=True)
    ours = CudaRunner(bundle, folder, HostSeam())
    tokens = prompts(5, 30, 9, 40, 3, vocab=100)
    answers = [conversation(each, tokens) for each in (ours, expected)]
    ours.close()
    expected.close()

    assert all(close(a, b, tolerance) for a, b in zip(*answers, strict=True))


def test_a_prompt_longer_than_a_call_runs_in_chunks(
    open_cuda: Open, reference: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_runtime.backends.cuda.runner.MAX_CALL_TOKENS", 32)
    runner, seam = open_cuda()
    tokens = prompts(50, 40, 40)
    runner.allocate(3, 1)

    ours = runner.prefill(range(3), tokens, [0] * 3, [1] * 3)

    assert all(shape[0] * shape[1] <= 32 for shape in seam.ran)
    expected = reference.prefill(range(3), tokens, [0] * 3, [1] * 3)
    assert all(close(a, b) for a, b in zip(ours, expected, strict=True))


def test_more_logits_than_a_call_brings_come_in_several(
    open_cuda: Open, reference: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_runtime.backends.cuda.runner.MAX_CALL_LOGITS", 32)
    runner, seam = open_cuda()
    tokens = prompts(50)
    runner.allocate(1, 1)

    ours = runner.prefill([0], tokens, [0], [45])[0]

    assert len(seam.ran) == 2
    assert close(ours, reference.prefill([0], tokens, [0], [45])[0])


def test_rows_share_a_prefill_call_only_where_they_begin_at_0_and_are_equally_long(
    open_cuda: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, seam = open_cuda()
    tokens = prompts(6, 6, 6, 9)
    runner.allocate(4, 1)
    for each in (runner, reference):
        each.allocate(4, 1)
        each.prefill(range(4), tokens, [0] * 4, [1] * 4)
    assert seam.ran == [(3, 6), (1, 9)]

    ours = runner.prefill([0, 1], tokens[:2], [6, 6], [1, 1])

    assert seam.ran[2:] == [(1, 6), (1, 6)]
    expected = reference.prefill([0, 1], tokens[:2], [6, 6], [1, 1])
    assert all(close(a, b) for a, b in zip(ours, expected, strict=True))


def test_a_slot_can_be_filled_to_the_bundles_limit(
    open_cuda: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, _ = open_cuda()
    limit = runner.limits.max_context
    tokens = prompts(limit - 2)
    answers = []
    for each in (runner, reference):
        each.allocate(2, 1)
        found = [each.prefill([0], tokens, [0], [1])[0].copy()]
        found += [each.decode([0], [3]).copy() for _ in range(2)]
        # Its neighbour runs on beside it, though the block has no room for the full one.
        each.prefill([1], prompts(4), [0], [1])
        found.append(each.decode([1], [3]).copy())
        answers.append(found)

    assert all(close(a, b) for a, b in zip(*answers, strict=True))
    with pytest.raises(CapacityError, match=rf"at most {limit} tokens .*got {limit + 1}"):
        runner.decode([0], [0])


# --- blocks and graphs --------------------------------------------------------------------------


def test_batches_run_in_blocks_of_few_sizes(open_cuda: Open, reference: OnnxRuntimeRunner) -> None:
    runner, seam = open_cuda()
    tokens = prompts(*[4] * 19)
    for each in (runner, reference):
        each.allocate(19, 1)
        each.prefill(range(19), tokens, [0] * 19, [1] * 19)
    sizes = []
    for slots in ([0, 1, 2], [5], [3, 4], [*range(9)], [*range(19)]):
        then = len(seam.ran)
        ours = runner.decode(slots, [9] * len(slots)).copy()
        assert close(ours, reference.decode(slots, [9] * len(slots)))
        sizes.append(list(seam.ran[then:]))

    assert runner.num_slots == 24
    assert sizes == [[(4, 1)], [(1, 1)], [(2, 1)], [(16, 1)], [(24, 1)]]


def test_idle_rows_of_a_block_keep_what_they_hold(
    open_cuda: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, _ = open_cuda()
    tokens = prompts(7, 11, 4, 5)
    for each in (runner, reference):
        each.allocate(4, 1)
        each.prefill(range(4), tokens, [0] * 4, [1] * 4)
        for step in range(3):
            each.decode([0, 2], [step, step])

    assert close(runner.decode([1, 3], [8, 9]), reference.decode([1, 3], [8, 9]))


def test_a_step_that_comes_again_is_captured_once_and_launched_from_then_on(
    open_cuda: Open,
) -> None:
    runner, seam = open_cuda()
    runner.allocate(4, 1)
    runner.prefill(range(4), prompts(3, 3, 3, 3), [0] * 4, [1] * 4)
    for _ in range(5):
        runner.decode(range(4), [1] * 4)
    for _ in range(3):
        runner.decode([2], [1])

    assert (seam.counts["capture"], seam.counts["launch"]) == (2, 4 + 2)
    assert [rows for _, rows in seam.captures] == [4, 1]
    assert runner.num_graphs == 2


def test_growing_captures_anew_and_never_launches_a_graph_of_before(
    open_cuda: Open, monkeypatch: pytest.MonkeyPatch, reference: OnnxRuntimeRunner
) -> None:
    monkeypatch.setattr("qwen_runtime.cache.GROWTH_STEP", 16)
    runner, seam = open_cuda()
    for each in (runner, reference):
        each.allocate(2, 1)
        each.prefill(range(2), prompts(12, 10), [0] * 2, [1] * 2)
    capacities = []
    for step in range(12):
        ours = runner.decode(range(2), [step] * 2).copy()
        capacities.append(runner.capacity)
        assert close(ours, reference.decode(range(2), [step] * 2))

    assert capacities == [16] * 4 + [32] * 8
    assert (seam.counts["capture"], seam.counts["release"]) == (2, 1)
    assert seam.captures[0] != seam.captures[1]


def test_growing_never_gives_room_back(open_cuda: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_runtime.cache.GROWTH_STEP", 8)
    runner, _ = open_cuda()
    runner.allocate(1, 40)
    runner.grow(1)
    runner.prefill([0], prompts(5), [0], [1])
    runner.decode([0], [1])
    assert runner.capacity == 40

    runner.allocate(1, 6)
    assert runner.capacity == 8


def test_graphs_that_were_not_used_for_longest_go(
    open_cuda: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "MAX_BINDINGS", 2)
    runner, seam = open_cuda()
    runner.allocate(4, 1)
    runner.prefill(range(4), prompts(3, 3, 3, 3), [0] * 4, [1] * 4)
    for slot in (0, 0, 1, 1, 2, 2, 0, 0):
        runner.decode([slot], [1])

    assert runner.num_graphs == 2
    assert (seam.counts["capture"], seam.counts["release"]) == (4, 2)


def test_only_decode_is_captured_and_float32_is_not_rounded(open_cuda: Open) -> None:
    _, seam = open_cuda()

    assert seam.sessions == [
        {"capture": False, "tf32": False},
        {"capture": True, "tf32": False},
        {"capture": False, "tf32": False},
    ]


# --- memory -------------------------------------------------------------------------------------


def test_weights_are_on_the_device_once_for_both_graphs(
    open_cuda: Open, lowered: tuple[Bundle, LoweredFolder]
) -> None:
    runner, seam = open_cuda()
    weights = lowered[0].manifest.files["weights.bin"].num_bytes

    assert weights * 0.8 < seam.counts["to_device"] < weights * 1.2
    before = runner.device_bytes
    runner.allocate(3, 10)
    assert runner.cache_bytes == BUFFERS * 4 * HEADS * runner.capacity * TOKEN_BYTES
    assert runner.device_bytes - before == runner.cache_bytes


def test_a_step_waits_once_and_brings_only_its_rows(open_cuda: Open) -> None:
    runner, seam = open_cuda()
    runner.allocate(4, 1)
    runner.prefill(range(4), prompts(3, 3, 3, 3), [0] * 4, [0] * 4)
    assert seam.counts["to_host"] == 0
    before = seam.counts.copy()

    runner.decode([0, 1], [1, 1])

    spent = seam.counts - before
    assert spent["synchronise"] == 1
    assert (spent["to_host"], spent["to_device"]) == (2 * VOCAB * 4, 2 * 2 * 8)


def test_a_token_chosen_on_the_device_is_the_first_of_the_highest(
    open_cuda: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, seam = open_cuda()
    for each in (runner, reference):
        each.allocate(4, 1)
        each.prefill(range(4), prompts(3, 9, 4, 5), [0] * 4, [1] * 4)
    assert runner.has_argmax
    before = seam.counts.copy()

    chosen = runner.decode_argmax([3, 0], [7, 8])

    assert chosen.tolist() == reference.decode([3, 0], [7, 8]).argmax(-1).tolist()
    assert (seam.counts - before)["to_host"] == 4 * 8  # a block of four rows


def test_copies_move_only_what_is_held(open_cuda: Open, reference: OnnxRuntimeRunner) -> None:
    runner, seam = open_cuda()
    for each in (runner, reference):
        each.allocate(2, 1)
        each.prefill([0], prompts(20), [0], [1])
    before = seam.counts["on_device"]
    for each in (runner, reference):
        each.copy(0, 1, 13)
        each.copy(0, 0, 20)

    assert close(runner.decode([1], [5]), reference.decode([1], [5]))
    assert seam.counts["on_device"] - before == BUFFERS * HEADS * 13 * TOKEN_BYTES


def test_much_too_large_buffers_give_way_to_smaller_ones(
    open_cuda: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, _ = open_cuda()
    for each in (runner, reference):
        each.allocate(20, 1)
        each.prefill([1], prompts(20), [0], [1])
    runner.allocate(2, 1)

    assert runner.num_slots == 2
    assert close(runner.decode([1], [5]), reference.decode([1], [5]))


def test_rows_that_do_not_fit_are_refused_and_the_others_stay(
    open_cuda: Open, reference: OnnxRuntimeRunner
) -> None:
    runner, _ = open_cuda(memory=9 << 20)
    for each in (runner, reference):
        each.allocate(2, 1)
        each.prefill([1], prompts(20), [0], [1])
    with pytest.raises(CapacityError, match=r"\d+ rows of \d+ tokens need .* prefix_cache_slots"):
        runner.allocate(10_000, 1)

    assert close(runner.decode([1], [5]), reference.decode([1], [5]))


def test_a_closed_runner_says_so_and_may_be_closed_again(open_cuda: Open) -> None:
    runner, _ = open_cuda()
    runner.allocate(1, 1)
    runner.close()
    runner.close()

    with pytest.raises(BackendError, match=r"the runner is closed"):
        runner.prefill([0], prompts(3), [0], [1])


def test_nothing_is_pending_when_buffers_have_moved(open_cuda: Open) -> None:
    runner, _ = open_cuda()
    runner.allocate(8, 1)
    runner.prefill([0], prompts(3), [0], [1])
    runner.truncate(0, 0)

    runner.allocate(2, 1)

    assert runner.num_slots == 2
    runner.prefill([1], prompts(3), [0], [1])
    assert runner.decode([1], [4]).shape == (1, VOCAB)
