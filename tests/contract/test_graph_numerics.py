"""What the embedded model's graphs compute: caches, masks, chunks and padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qwen_export.bundle import embedded_model
from qwen_export.checkpoint import open_checkpoint
from qwen_export.model.decoder import Decoder
from qwen_runtime.bundle import Bundle

PHASES = ("prefill", "decode")
LAYERS, KV_HEADS, HEAD_DIM, VOCAB = 8, 2, 32, 4096
CAPACITY = 24

Array = np.ndarray[Any, Any]
Cache = dict[str, Array]


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Bundle) -> dict[str, ort.InferenceSession]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return {
        phase: ort.InferenceSession(
            tiny_bundle.path / f"{phase}.onnx", options, providers=["CPUExecutionProvider"]
        )
        for phase in PHASES
    }


def empty(rows: int, fill: float = 0.0) -> Cache:
    return {
        f"past_key_values.{layer}.{part}": np.full(
            (rows, KV_HEADS, CAPACITY, HEAD_DIM), fill, np.float32
        )
        for layer in range(LAYERS)
        for part in ("key", "value")
    }


def feeds(ids: Array, past: Any, indices: Any | None) -> Cache:
    values = {"input_ids": ids, "past_lengths": np.asarray(past, np.int64)}
    if indices is not None:
        values["logits_indices"] = np.asarray(indices, np.int64)
    return values


def run(
    session: ort.InferenceSession, ids: Array, past: Any, indices: Any | None, cache: Cache
) -> tuple[Array, Cache]:
    names = [value.name for value in session.get_outputs()]
    values = dict(zip(names, session.run(None, feeds(ids, past, indices) | cache), strict=True))
    logits = values.pop("logits")
    return logits, {name.replace("present", "past_key_values"): v for name, v in values.items()}


def error(actual: Array, expected: Array) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def tokens(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, VOCAB, shape, dtype=np.int64)


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Bundle) -> Decoder:
    """The module that was traced, with the bundle's weights."""
    module = Decoder(
        open_checkpoint(embedded_model()).config,
        tied=True,
        max_context=tiny_bundle.manifest.max_context,
    )
    initializers = ir.load(tiny_bundle.path / "prefill.onnx").graph.initializers
    state = {
        name: torch.from_numpy(value.const_value.numpy().copy())
        for name, value in initializers.items()
        if value.const_value is not None and not name.startswith("constant.")
    }
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("phase", PHASES)
def test_graphs_answer_like_the_module_they_were_traced_from(sessions, decoder, phase):
    _, cache = run(sessions["prefill"], tokens(2, 6), [0, 0], [[5], [5]], empty(2))
    size = 5 if phase == "prefill" else 1
    ids, past = tokens(2, size, seed=1), np.array([6, 3])
    indices = np.array([[4, 0, 2], [1, 3, 3]]) if phase == "prefill" else None
    logits, updated = run(sessions[phase], ids, past, indices, cache)
    pairs = [torch.from_numpy(value.copy()) for value in cache.values()]
    with torch.no_grad():
        expected, present = decoder(
            torch.from_numpy(ids),
            torch.from_numpy(past),
            None if indices is None else torch.from_numpy(indices),
            list(zip(pairs[::2], pairs[1::2], strict=True)),
        )
    assert error(logits, expected.numpy()) <= 1e-5
    for name, value in zip(cache, (part for pair in present for part in pair), strict=True):
        assert error(updated[name], value.numpy()) <= 1e-5


@pytest.mark.parametrize("phase", PHASES)
def test_updating_caches_in_place_equals_copies(sessions, phase):
    session, prompt = sessions[phase], tokens(2, 6)
    _, cache = run(sessions["prefill"], prompt, [0, 0], [[5], [5]], empty(2))
    size = 3 if phase == "prefill" else 1
    ids, past = tokens(2, size, seed=1), [6, 4]
    indices = [[size - 1], [0]] if phase == "prefill" else None
    expected, updated = run(session, ids, past, indices, cache)

    buffers = {
        name: ort.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in cache.items()
    }
    addresses = {name: value.data_ptr() for name, value in buffers.items()}
    binding = session.io_binding()
    for name, value in feeds(ids, past, indices).items():
        binding.bind_cpu_input(name, value)
    for name, value in buffers.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)

    assert np.array_equal(binding.get_outputs()[-1].numpy(), expected)
    for name, value in buffers.items():
        assert value.data_ptr() == addresses[name]
        assert np.array_equal(value.numpy(), updated[name])
        assert not np.array_equal(updated[name], cache[name])


def test_only_the_new_slots_of_a_cache_are_written(sessions):
    _, cache = run(sessions["prefill"], tokens(2, 3), [5, 9], [[0], [0]], empty(2, fill=7.0))
    for values in cache.values():
        for row, past in enumerate((5, 9)):
            written = (values[row] != 7.0).all(axis=(0, 2))
            assert np.flatnonzero(written).tolist() == [past, past + 1, past + 2]


def test_ragged_rows_equal_rows_alone(sessions):
    prompts = tokens(2, 9)
    lengths = [9, 5]
    logits, cache = run(sessions["prefill"], prompts, [0, 0], [[8], [4]], empty(2))
    chunk = tokens(2, 4, seed=1)
    more, cache = run(sessions["prefill"], chunk, lengths, [[3], [3]], cache)
    step = tokens(2, 1, seed=2)
    last, _ = run(sessions["decode"], step, [13, 9], None, cache)
    for row, length in enumerate(lengths):
        alone = prompts[row : row + 1, :length]
        first, single = run(sessions["prefill"], alone, [0], [[length - 1]], empty(1))
        second, single = run(sessions["prefill"], chunk[row : row + 1], [length], [[3]], single)
        third, _ = run(sessions["decode"], step[row : row + 1], [length + 4], None, single)
        assert error(logits[row : row + 1], first) <= 1e-6
        assert error(more[row : row + 1], second) <= 1e-6
        assert error(last[row : row + 1], third) <= 1e-6


def test_prefill_in_chunks_equals_the_whole(sessions):
    prompt, every = tokens(1, 12), [list(range(12))]
    whole, expected = run(sessions["prefill"], prompt, [0], every, empty(1))
    first, cache = run(sessions["prefill"], prompt[:, :5], [0], [[*range(5)]], empty(1))
    second, cache = run(sessions["prefill"], prompt[:, 5:], [5], [[*range(7)]], cache)
    assert error(np.concatenate([first, second], axis=1), whole) <= 1e-6
    for name, value in expected.items():
        assert error(cache[name], value) <= 1e-6


def test_padding_tokens_and_stale_slots_change_nothing(sessions):
    ids, indices = tokens(2, 8), [[7], [3]]
    expected, _ = run(sessions["prefill"], ids, [0, 0], indices, empty(2))
    ids[1, 4:] = tokens(4, seed=3)
    actual, _ = run(sessions["prefill"], ids, [0, 0], indices, empty(2, fill=1e4))
    assert np.array_equal(actual, expected)


def test_a_token_in_sight_changes_the_logits(sessions):
    ids, indices = tokens(2, 8), [[7], [3]]
    expected, _ = run(sessions["prefill"], ids, [0, 0], indices, empty(2))
    ids[1, 3] = (ids[1, 3] + 1) % VOCAB
    actual, _ = run(sessions["prefill"], ids, [0, 0], indices, empty(2))
    assert np.array_equal(actual[0], expected[0])
    assert error(actual[1], expected[1]) > 1e-3


@pytest.mark.parametrize("offset", [-1, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_wrong_past_lengths_change_the_logits(sessions, phase, offset):
    _, cache = run(sessions["prefill"], tokens(1, 6), [0], [[5]], empty(1))
    ids = tokens(1, 1, seed=1)
    indices = [[0]] if phase == "prefill" else None
    right, _ = run(sessions[phase], ids, [6], indices, cache)
    wrong, _ = run(sessions[phase], ids, [6 + offset], indices, cache)
    assert error(wrong, right) > 1e-3


def test_decode_equals_prefill_of_one_token(sessions):
    _, cache = run(sessions["prefill"], tokens(2, 6), [0, 0], [[5], [5]], empty(2))
    ids, past = tokens(2, 1, seed=1), [6, 3]
    expected, prefilled = run(sessions["prefill"], ids, past, [[0], [0]], cache)
    actual, decoded = run(sessions["decode"], ids, past, None, cache)
    assert error(actual, expected) <= 1e-6
    for name, value in prefilled.items():
        assert error(decoded[name], value) <= 1e-6


def test_logits_indices_choose_positions_in_any_order(sessions):
    ids = tokens(1, 7)
    every, _ = run(sessions["prefill"], ids, [0], [list(range(7))], empty(1))
    some, _ = run(sessions["prefill"], ids, [0], [[6, 0, 0]], empty(1))
    assert error(some, every[:, [6, 0, 0]]) <= 1e-6
