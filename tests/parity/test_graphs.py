"""Rung 3: the ONNX graphs against logits that transformers computed and the golden set stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity.golden_models import SUPPORTED

from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.comparison import compare, tolerance_for

Forward = dict[str, np.ndarray[Any, Any]]
TOLERANCE = tolerance_for("fp32", 2)
STORED = [name for name in SUPPORTED if name != "qwen2_text"]


@pytest.fixture
def runner(
    request: pytest.FixtureRequest, golden_bundle: Callable[[str], Path]
) -> Iterator[OnnxRuntimeRunner]:
    runner = OnnxRuntimeRunner(Bundle.open(golden_bundle(request.param)), decode_graph=True)
    runner.allocate(3, 20)
    yield runner
    runner.close()


@pytest.mark.parametrize(("runner", "name"), [(n, n) for n in STORED], indirect=["runner"])
def test_prefill_agrees_with_the_stored_golden_logits(
    runner: OnnxRuntimeRunner, name: str, forward: Forward
) -> None:
    ids = forward["ids1"][0]
    (logits,) = runner.prefill([0], [ids], [0], [len(ids)])
    found = compare(logits, forward[f"{name}_logits"], tolerance=TOLERANCE)
    assert not found.failed.any(), found.errors.max()
    (shifted,) = runner.prefill([0], [ids[1:]], [0], [len(ids) - 1])
    assert compare(shifted, forward[f"{name}_logits"][1:], tolerance=TOLERANCE).failed.any()


@pytest.mark.parametrize(("runner", "name"), [(n, n) for n in STORED], indirect=["runner"])
def test_decode_agrees_with_the_stored_golden_logits(
    runner: OnnxRuntimeRunner, name: str, forward: Forward
) -> None:
    ids = forward["ids1"][0]
    runner.prefill([0], [ids[:1]], [0], [1])
    steps = np.stack([runner.decode([0], [int(token)])[0].copy() for token in ids[1:]])
    found = compare(steps, forward[f"{name}_logits"][1:], tolerance=TOLERANCE)
    assert not found.failed.any(), found.errors.max()


@pytest.mark.parametrize(("runner", "name"), [(n, n) for n in STORED], indirect=["runner"])
def test_ragged_rows_agree_with_the_stored_left_padded_batch(
    runner: OnnxRuntimeRunner, name: str, forward: Forward
) -> None:
    mask = forward["mask_batch"] == 1
    rows = [ids[real] for ids, real in zip(forward["ids_batch"], mask, strict=True)]
    logits = np.concatenate(runner.prefill(range(3), rows, [0] * 3, [1] * 3))
    found = compare(logits, forward[f"{name}_batch_last_logits"], tolerance=TOLERANCE)
    assert not found.failed.any(), found.errors.max()
