"""The streamed reference is transformers, layer by layer."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from parity.golden_models import SUPPORTED
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from qwen_export.checkpoint import Checkpoint
from qwen_export.parity import reference as reference_module
from qwen_export.parity.reference import ReferenceBatch, Rope, StreamedReference

Checkpoints = Callable[[str], Checkpoint]
Forward = dict[str, np.ndarray[Any, Any]]


def streamed(
    checkpoint: Checkpoint, rows: list[npt.NDArray[np.int64]], rope: Rope = "exact"
) -> list[npt.NDArray[np.float32]]:
    """Logits of every position of rows that run as one batch."""
    reference = StreamedReference(checkpoint)
    positions = tuple(np.arange(len(row)) for row in rows)
    (states,) = reference.hidden_states([ReferenceBatch(tuple(rows), positions, rope)])
    return [reference.logits(state) for state in states]


def error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float((np.abs(found - expected).max(1) / np.abs(expected).max(1)).max())


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_streamed_layers_equal_the_whole_model(
    name: str, golden_checkpoint: Checkpoints, full_model: Callable[[str], Any]
) -> None:
    ids = np.arange(60) * 7 % 128
    expected = full_model(name)(torch.from_numpy(ids)[None]).logits[0].numpy()
    (found,) = streamed(golden_checkpoint(name), [ids])
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name != "qwen2_text"])
def test_reference_agrees_with_the_stored_golden_logits(
    name: str, golden_checkpoint: Checkpoints, forward: Forward
) -> None:
    (found,) = streamed(golden_checkpoint(name), [forward["ids1"][0]])
    assert error(found, forward[f"{name}_logits"]) < 1e-5


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_tied_bias"])
def test_left_padded_batch_agrees_with_the_stored_golden_logits(
    name: str, golden_checkpoint: Checkpoints, forward: Forward
) -> None:
    mask = forward["mask_batch"] == 1
    rows = [ids[real] for ids, real in zip(forward["ids_batch"], mask, strict=True)]
    found = np.stack([row[-1] for row in streamed(golden_checkpoint(name), rows)])
    assert error(found, forward[f"{name}_batch_last_logits"]) < 1e-5


def test_rows_of_a_left_padded_batch_do_not_see_their_padding(
    golden_checkpoint: Checkpoints,
) -> None:
    rows = [np.arange(9), np.arange(20, 24), np.arange(40, 41)]
    checkpoint = golden_checkpoint("qwen2_untied")
    for together, row in zip(streamed(checkpoint, rows), rows, strict=True):
        (alone,) = streamed(checkpoint, [row])
        assert error(together, alone) < 1e-5


@pytest.mark.parametrize("rope", ["wrong theta", "swapped halves"])
def test_wrong_rotations_are_far_from_the_golden_logits(
    rope: Rope, golden_checkpoint: Checkpoints, forward: Forward
) -> None:
    (found,) = streamed(golden_checkpoint("qwen2_untied"), [forward["ids1"][0]], rope)
    assert error(found, forward["qwen2_untied_logits"]) > 0.1


def test_a_token_does_not_see_those_after_it(golden_checkpoint: Checkpoints) -> None:
    checkpoint = golden_checkpoint("qwen2_untied")
    ids = np.arange(12)
    (found,) = streamed(checkpoint, [ids])
    (other,) = streamed(checkpoint, [np.concatenate((ids[:6], ids[:6]))])
    assert np.array_equal(found[:6], other[:6])
    assert error(found[6:], other[6:]) > 0.01


def test_vocabulary_in_blocks_gives_the_same_logits(
    golden_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, ids = golden_checkpoint("qwen2_tied"), np.arange(5)
    (whole,) = streamed(checkpoint, [ids])
    monkeypatch.setattr(reference_module, "TABLE_BLOCK_BYTES", 4 * 32 * 50)
    (blocks,) = streamed(checkpoint, [ids])
    assert error(blocks, whole) < 1e-6


def test_at_most_one_layer_is_alive(golden_checkpoint: Checkpoints) -> None:
    alive: list[int] = []

    def count(_: int) -> None:
        alive.append(sum(type(item) is Qwen2DecoderLayer for item in gc.get_objects()))

    gc.collect()
    before = sum(type(item) is Qwen2DecoderLayer for item in gc.get_objects())
    reference = StreamedReference(golden_checkpoint("qwen2_untied"))
    batch = ReferenceBatch((np.arange(3),), (np.arange(3),))
    reference.hidden_states([batch], count)
    assert alive == [before, before]
