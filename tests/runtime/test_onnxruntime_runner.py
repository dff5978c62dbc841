"""The ONNX Runtime runner: in place, growing, splitting, and the same numbers however it is fed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_runtime import cache as cache_module
from qwen_runtime.backends import onnxruntime as backend
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError, CapacityError, RequestError

VOCAB = 128
LIMIT = 64


@pytest.fixture(scope="module")
def bundle(golden_bundle: Callable[[str], Path]) -> Bundle:
    return Bundle.open(golden_bundle("qwen2_untied"))


@pytest.fixture(scope="module")
def shared_runner(bundle: Bundle) -> Iterator[OnnxRuntimeRunner]:
    runner = OnnxRuntimeRunner(bundle, threads=1)
    yield runner
    runner.close()


@pytest.fixture
def runner(shared_runner: OnnxRuntimeRunner) -> OnnxRuntimeRunner:
    """Without slots, as when it was made."""
    shared_runner._bindings.clear()
    shared_runner._cache.clear()
    return shared_runner


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int64)


def prompt(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


def whole(runner: OnnxRuntimeRunner, slot: int, tokens: np.ndarray) -> np.ndarray:
    """Logits of every position of a prompt, in one prefill call."""
    runner.allocate(slot + 1, 1)
    return runner.prefill([slot], [tokens], [0], [len(tokens)])[0]


def addresses(runner: OnnxRuntimeRunner) -> list[int]:
    return [view.ctypes.data for _, view in runner._cache.rows(0, runner.num_slots)]


def close(ours: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max())


def test_limits_are_the_bundles(runner: OnnxRuntimeRunner) -> None:
    assert (runner.limits.vocab_size, runner.limits.max_context) == (VOCAB, LIMIT)
    assert (runner.num_slots, runner.capacity, runner.cache_bytes) == (0, 0, 0)


def test_allocated_bytes_are_those_of_the_shape(runner: OnnxRuntimeRunner) -> None:
    runner.allocate(3, 10)

    # 2 layers, key and value, 2 heads of 8, float32.
    assert runner.cache_bytes == 2 * 2 * 3 * 2 * runner.capacity * 8 * 4
    assert runner.capacity == LIMIT


def test_decoding_token_by_token_gives_the_logits_of_the_whole_prompt(
    runner: OnnxRuntimeRunner,
) -> None:
    tokens = prompt(1, 12)
    expected = whole(runner, 0, tokens)

    runner.truncate(0, 0)
    steps = [runner.decode([0], [int(token)])[0].copy() for token in tokens]

    assert close(np.stack(steps), expected)


def test_wrong_past_is_noticed_by_the_comparison(runner: OnnxRuntimeRunner) -> None:
    tokens = prompt(1, 12)
    expected = whole(runner, 0, tokens)

    runner.prefill([0], [tokens[:6]], [0], [0])
    shifted = runner.prefill([0], [tokens[6:]], [5], [6])[0]

    assert not close(shifted, expected[6:])


def test_only_the_wanted_logits_come_back(runner: OnnxRuntimeRunner) -> None:
    tokens = prompt(2, 9)
    every = whole(runner, 2, tokens)

    rows = runner.prefill([0, 1, 2], [tokens] * 3, [0, 0, 0], [0, 1, 4])

    assert [row.shape[0] for row in rows] == [0, 1, 4]
    assert close(rows[1], every[-1:])
    assert close(rows[2], every[-4:])


@pytest.mark.parametrize("chunk", [1, 4, 5, 20])
def test_chunked_prefill_equals_whole(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    tokens = prompt(3, 20)
    expected = whole(runner, 0, tokens)
    after = runner.decode([0], [7])[0].copy()

    monkeypatch.setattr(backend, "PREFILL_CHUNK", chunk)
    runner.truncate(0, 0)
    # Wanted positions lie in several chunks.
    chunked = runner.prefill([0], [tokens], [0], [20])[0]

    assert close(chunked, expected)
    assert close(runner.decode([0], [7])[0], after)


@pytest.mark.parametrize("chunk", [4, 6, 8])
def test_no_chunk_of_a_row_is_a_single_token_so_that_cuts_change_no_bit(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    tokens = prompt(3, 2 * chunk + 1)
    expected = whole(runner, 0, tokens)

    monkeypatch.setattr(backend, "PREFILL_CHUNK", chunk)
    runner.truncate(0, 0)
    chunked = runner.prefill([0], [tokens], [0], [len(tokens)])[0]

    np.testing.assert_array_equal(chunked, expected)


def test_chunked_prefill_of_several_rows_returns_each_rows_own_logits(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [prompt(seed, 11) for seed in (1, 2, 3)]
    expected = [whole(runner, slot, row)[-6:] for slot, row in enumerate(rows)]

    monkeypatch.setattr(backend, "PREFILL_CHUNK", 4)
    chunked = runner.prefill([0, 1, 2], rows, [0, 0, 0], [6, 6, 6])

    assert all(close(ours, theirs) for ours, theirs in zip(chunked, expected, strict=True))


def calls_of(runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Slots of every call that is made from now on, first and one past the last."""
    calls: list[tuple[int, int]] = []
    bind = backend._bind_cache

    def watch(io: object, cache: cache_module.KVCache, first: int, last: int) -> None:
        calls.append((first, last))
        bind(io, cache, first, last)

    runner._bindings.clear()
    monkeypatch.setattr(backend, "_bind_cache", watch)
    return calls


def test_prefill_runs_no_more_tokens_at_once_than_a_chunk(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [prompt(seed, 10) for seed in range(5)]
    runner.allocate(5, 1)
    together = runner.prefill(range(5), rows, [0] * 5, [1] * 5)
    calls = calls_of(runner, monkeypatch)
    monkeypatch.setattr(backend, "PREFILL_CHUNK", 24)

    split = runner.prefill(range(5), rows, [0] * 5, [1] * 5)

    assert calls == [(0, 2), (2, 4), (4, 5)]
    np.testing.assert_array_equal(np.stack(split), np.stack(together))


def test_prefill_after_a_reused_prefix_equals_recomputing_it(runner: OnnxRuntimeRunner) -> None:
    tokens = prompt(4, 15)
    expected = whole(runner, 0, tokens)

    whole(runner, 0, np.concatenate([tokens[:9], prompt(5, 20)]))
    reused = runner.prefill([0], [tokens[9:]], [9], [6])[0]

    assert close(reused, expected[9:])


def test_batch_equals_single_bit_by_bit(runner: OnnxRuntimeRunner) -> None:
    rows = [prompt(seed, 10) for seed in range(4)]
    alone = []
    runner.allocate(4, 1)
    for row in rows:
        logits = [runner.prefill([0], [row], [0], [1])[0][0]]
        logits += [runner.decode([0], [token])[0].copy() for token in (3, 4, 5)]
        alone.append(np.stack(logits))

    first = runner.prefill([0, 1, 2, 3], rows, [0] * 4, [1] * 4)
    steps = [runner.decode([0, 1, 2, 3], [token] * 4).copy() for token in (3, 4, 5)]

    for row in range(4):
        together = np.stack([first[row][0], *(step[row] for step in steps)])
        np.testing.assert_array_equal(together, alone[row])


def test_rows_of_different_lengths_do_not_influence_each_other(runner: OnnxRuntimeRunner) -> None:
    rows = [prompt(seed, length) for seed, length in enumerate((3, 17, 1, 17, 8))]
    alone = [whole(runner, 0, row)[-1] for row in rows]

    runner.allocate(5, 1)
    together = runner.prefill([4, 0, 2, 1, 3], rows, [0] * 5, [1] * 5)

    for ours, expected in zip(together, alone, strict=True):
        assert close(ours[0], expected)


@given(
    slots=st.permutations(range(6)).flatmap(
        lambda order: st.integers(1, 6).map(lambda count: order[:count])
    ),
    lengths=st.lists(st.integers(1, 20), min_size=6, max_size=6),
)
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_slots_in_any_order_decode_as_they_would_alone(
    runner: OnnxRuntimeRunner, slots: list[int], lengths: list[int]
) -> None:
    runner.allocate(6, 1)
    for slot in range(6):
        runner.prefill([slot], [prompt(slot, lengths[slot])], [0], [1])
    tokens = [10 + slot for slot in slots]
    expected = []
    for slot, token in zip(slots, tokens, strict=True):
        expected.append(runner.decode([slot], [token])[0].copy())
        runner.truncate(slot, lengths[slot])

    together = runner.decode(slots, tokens)

    assert together.shape == (len(slots), VOCAB)
    assert all(close(ours, theirs) for ours, theirs in zip(together, expected, strict=True))
    held = [lengths[slot] + (slot in slots) for slot in range(6)]
    assert runner._cache.lengths.tolist() == held


def test_idle_slots_are_left_as_they_were(runner: OnnxRuntimeRunner) -> None:
    rows = [prompt(seed, 8) for seed in range(3)]
    runner.allocate(3, 1)
    runner.prefill([0, 1, 2], rows, [0] * 3, [1] * 3)
    expected = runner.decode([1], [9])[0].copy()
    runner.truncate(1, 8)

    for _ in range(5):
        runner.decode([0, 2], [4, 5])

    assert close(runner.decode([1], [9])[0], expected)


def test_many_idle_slots_between_running_ones_do_not_run_along(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = backend.MAX_IDLE_ROWS + 1, 3 * backend.MAX_IDLE_ROWS
    slots = [0, near, far]
    runner.allocate(far + 1, 1)
    runner.prefill(slots, [prompt(slot, 5) for slot in slots], [0] * 3, [1] * 3)
    expected = [runner.decode([slot], [9])[0].copy() for slot in slots]
    for slot in slots:
        runner.truncate(slot, 5)
    calls = calls_of(runner, monkeypatch)

    together = runner.decode(slots, [9] * 3)

    assert calls == [(0, near + 1), (far, far + 1)]
    assert all(close(ours, theirs) for ours, theirs in zip(together, expected, strict=True))


def test_bindings_are_few_and_share_their_logits(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "MAX_BINDINGS", 2)
    runner.allocate(5, 1)
    for slot in range(5):
        whole(runner, slot, prompt(slot, 5))
    expected = [runner.decode([slot], [1])[0].copy() for slot in range(5)]
    for slot in range(5):
        runner.truncate(slot, 5)

    np.testing.assert_array_equal(runner.decode(range(5), [1] * 5), expected)
    assert list(runner._bindings) == [(4, 5), (0, 5)]
    assert all(binding.logits.base is runner._logits for binding in runner._bindings.values())


def test_failed_growth_leaves_bindings_that_work(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt(3, 8)
    expected = whole(runner, 0, tokens)
    runner.truncate(0, 6)
    steps = [runner.decode([0], [int(tokens[6])])[0].copy()]

    def full(*_: object) -> np.ndarray:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner._cache, "_zeros", full)
        with pytest.raises(KeyboardInterrupt):
            runner.allocate(9, 1)
    steps.append(runner.decode([0], [int(tokens[7])])[0])

    assert close(np.stack(steps), expected[6:])


def test_idle_slot_at_full_capacity_does_not_run_along(runner: OnnxRuntimeRunner) -> None:
    full = prompt(0, LIMIT)
    runner.allocate(3, 1)
    runner.prefill([1], [full], [0], [1])
    before = [view.copy() for _, view in runner._cache.rows(1, 2)]
    runner.prefill([0, 2], [prompt(1, 5), prompt(2, 6)], [0, 0], [1, 1])
    expected = [runner.decode([slot], [9])[0].copy() for slot in (0, 2)]
    runner.truncate(0, 5)
    runner.truncate(2, 6)

    together = runner.decode([2, 0], [9, 9])

    assert close(together[1], expected[0])
    assert close(together[0], expected[1])
    for (_, view), kept in zip(runner._cache.rows(1, 2), before, strict=True):
        np.testing.assert_array_equal(view, kept)


def test_steps_change_the_same_memory_and_add_none(runner: OnnxRuntimeRunner) -> None:
    runner.allocate(2, 1)
    runner.prefill([0, 1], [prompt(0, 5), prompt(1, 5)], [0, 0], [1, 1])
    places, size = addresses(runner), runner.cache_bytes
    logits = {runner.decode([0, 1], [1, 2]).ctypes.data for _ in range(20)}

    assert addresses(runner) == places
    assert runner.cache_bytes == size
    assert len(logits) == 1, "the logits buffer is bound once"
    assert len(runner._bindings) == 1
    written = [view[:, :, :25].any(axis=(1, 3)).all() for _, view in runner._cache.rows(0, 2)]
    assert all(written)


def test_growing_midway_changes_no_bit_of_what_is_held(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = prompt(6, 40)
    expected = whole(runner, 0, tokens)
    runner._bindings.clear()
    runner._cache.clear()
    monkeypatch.setattr(cache_module, "GROWTH_STEP", 8)

    runner.allocate(2, 1)
    first = runner.prefill([0], [tokens[:7]], [0], [7])[0]
    assert runner.capacity == 8
    capacities, steps = set(), []
    for token in tokens[7:]:
        steps.append(runner.decode([0], [int(token)])[0].copy())
        capacities.add(runner.capacity)

    assert capacities == {8, 16, 24, 32, 40}
    assert close(np.concatenate([first, np.stack(steps)]), expected)


def test_growing_never_gives_room_back(
    runner: OnnxRuntimeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "GROWTH_STEP", 8)
    runner.allocate(1, 40)
    runner.grow(1)
    runner.prefill([0], [prompt(0, 5)], [0], [1])
    runner.decode([0], [1])
    assert runner.capacity == 40

    runner.allocate(1, 6)
    assert runner.capacity == 8


def test_row_fills_up_to_the_last_token_and_one_more_is_refused(runner: OnnxRuntimeRunner) -> None:
    tokens = prompt(7, LIMIT)
    expected = whole(runner, 0, tokens)
    runner.truncate(0, LIMIT - 1)

    assert close(runner.decode([0], [int(tokens[-1])])[0], expected[-1])
    with pytest.raises(CapacityError, match=r"at most 64 tokens .*got 65"):
        runner.decode([0], [1])
    with pytest.raises(CapacityError, match=r"at most 64 tokens .*got 65"):
        runner.prefill([0], [prompt(0, 5)], [60], [1])
    with pytest.raises(CapacityError, match=r"at most 64 tokens .*got 100"):
        runner.grow(100)
    runner.truncate(0, 3)
    assert close(runner.decode([0], [int(tokens[3])])[0], expected[3])


def test_copied_slot_goes_on_like_its_source(runner: OnnxRuntimeRunner) -> None:
    tokens = prompt(8, 10)
    runner.allocate(3, 1)
    runner.prefill([0], [tokens], [0], [1])
    runner.prefill([2], [prompt(9, 20)], [0], [1])

    runner.copy(0, 2, 10)

    both = runner.decode([0, 2], [5, 5])
    np.testing.assert_array_equal(both[0], both[1])
    runner.copy(0, 2, 4)
    shorter = runner.decode([2], [int(tokens[4])])[0]
    assert close(shorter, whole(runner, 1, tokens[:5])[-1])


def test_decode_graph_gives_the_same_logits(bundle: Bundle, runner: OnnxRuntimeRunner) -> None:
    other = OnnxRuntimeRunner(bundle, threads=1, decode_graph=True)
    for each in (runner, other):
        each.allocate(2, 1)
        each.prefill([0, 1], [prompt(1, 6), prompt(2, 6)], [0, 0], [1, 1])

    for token in (4, 5, 6):
        assert close(other.decode([0, 1], [token, 3]), runner.decode([0, 1], [token, 3]))
    other.close()


def test_number_of_threads_reaches_the_session(bundle: Bundle) -> None:
    runner = OnnxRuntimeRunner(bundle, threads=1)

    assert runner._prefill.get_session_options().intra_op_num_threads == 1
    runner.close()


@pytest.mark.parametrize("threads", [0, -1, True, 1.0, "2"])
def test_number_of_threads_must_be_a_count(bundle: Bundle, threads: object) -> None:
    with pytest.raises(RequestError, match="threads must be an integer >= 1") as error:
        OnnxRuntimeRunner(bundle, threads=threads)  # type: ignore[arg-type]
    assert error.value.param == "threads"


def test_closed_runner_says_so(bundle: Bundle) -> None:
    runner = OnnxRuntimeRunner(bundle, threads=1)
    runner.allocate(1, 1)
    runner.close()

    assert runner.cache_bytes == 0
    runner.truncate(0, 0)
    with pytest.raises(BackendError, match="the runner is closed"):
        runner.prefill([0], [ids(1)], [0], [1])
    with pytest.raises(BackendError, match="the runner is closed"):
        runner.decode([0], [1])
    with pytest.raises(BackendError, match="the runner is closed"):
        runner.allocate(1, 1)


def test_bundle_with_another_compute_type_is_refused(bundle: Bundle) -> None:
    other = replace(bundle, manifest=replace(bundle.manifest, compute_dtype="bf16"))

    with pytest.raises(BackendError, match="CPU needs a bundle with compute_dtype fp32, got bf16"):
        OnnxRuntimeRunner(other)


def test_bundle_for_a_newer_engine_is_refused(bundle: Bundle) -> None:
    newer = replace(bundle.manifest, minimum_engine_versions={"onnxruntime": "99.1"})

    with pytest.raises(BackendError, match=r"onnxruntime must be at least 99\.1 for this bundle"):
        OnnxRuntimeRunner(replace(bundle, manifest=newer))


def test_missing_engine_says_how_to_install_it(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(BackendError, match=r"pip install 'qwen-export\[cpu\]'"):
        OnnxRuntimeRunner(bundle)


def test_damaged_graph_is_an_error_that_names_it(bundle: Bundle, tmp_path: Path) -> None:
    for file in bundle.path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "prefill.onnx").unlink()
    (tmp_path / "prefill.onnx").write_bytes(b"\x00" * 100)

    with pytest.raises(BackendError, match=r"could not load .*prefill\.onnx"):
        OnnxRuntimeRunner(replace(bundle, path=tmp_path))


MEASURE = """
import sys
import numpy as np
import onnxruntime
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return [int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]

bundle = Bundle.open(sys.argv[1])
before = resident()
runner = OnnxRuntimeRunner(bundle, decode_graph=sys.argv[2] == "decode graph")
other = OnnxRuntimeRunner(bundle) if sys.argv[2] == "two runners" else None
runner.allocate(1, 64)
runner.prefill([0], [np.arange(32)], [0], [1])
for token in range(8):
    runner.decode([0], [token])
print(*(now - then for now, then in zip(resident(), before)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_weights_are_in_memory_once_for_both_phases(
    build_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Only where weights are most of the memory does their number show: 2 layers, a real vocabulary.
    checkpoint = tmp_path_factory.mktemp("random") / "model"
    generator = Path(__file__).parents[2] / "benchmarks" / "random_checkpoint.py"
    subprocess.run(
        [sys.executable, str(generator), "Qwen2.5-0.5B", str(checkpoint), "--layers", "2"],
        check=True,
        capture_output=True,
    )
    folder = build_bundle(checkpoint, max_context=256)
    manifest = Bundle.open(folder).manifest
    weights = manifest.files["weights.bin"].num_bytes
    table = manifest.model.vocab_size * manifest.model.hidden_size * 4

    def measure(arrangement: str) -> tuple[int, int]:
        command = [sys.executable, "-c", MEASURE, str(folder), arrangement]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        anonymous, mapped = map(int, result.stdout.split())
        return anonymous, mapped

    anonymous, mapped = measure("one runner")
    assert 0.9 * weights < anonymous < 1.1 * weights
    # A tied table is packed for the logits and stays mapped for the embeddings: clean pages.
    assert mapped < table + 0.1 * weights

    # With the decode graph beside it nothing is packed: both map the file.
    assert measure("decode graph")[0] < 0.1 * weights
    # The measurement sees a second copy where there is one.
    assert measure("two runners")[0] > 1.8 * weights
