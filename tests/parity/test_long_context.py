"""Scaled rotary embeddings and sliding windows, on every rung: mask, reference, graphs, verify."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from parity.conftest import GOLDEN

from qwen_export.bundle import BuildOptions, build
from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.model import ops
from qwen_export.parity import verify
from qwen_export.parity.prompts import make_prompts
from qwen_export.parity.reference import ReferenceBatch, StreamedReference
from qwen_export.parity.summarise import WIDE_WINDOW
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.check import check
from qwen_runtime.comparison import compare, tolerance_for

SLIDING = {"qwen2_sliding": 6, "qwen2_layer_types": 4}
"""Windows by model."""
SCALED = ("qwen2_yarn_legacy", "qwen2_yarn_full", "qwen2_linear", "qwen2_llama3")
# Recorded over 20 tokens; "dynamic" has 12 tokens of plain rotations, and other ones from there.
RECORDED = (*SLIDING, *SCALED)
NAMES = (*RECORDED, "qwen2_dynamic")
TOLERANCE = tolerance_for("fp32", 3)

Array = np.ndarray[Any, Any]
Bundles = Callable[[str], Path]
Checkpoints = Callable[[str], Checkpoint]


def error(found: Array, expected: Array) -> float:
    return float((np.abs(found - expected).max(1) / np.abs(expected).max(1)).max())


def streamed(
    checkpoint: Checkpoint, rows: list[Array], *, widened: int = 0
) -> tuple[StreamedReference, list[Array]]:
    """The reference, and the logits of every position of rows that run as one batch."""
    reference = StreamedReference(checkpoint)
    positions = tuple(np.arange(len(row)) for row in rows)
    batch = ReferenceBatch(tuple(rows), positions, widened=widened)
    (states,) = reference.hidden_states([batch])
    return reference, [reference.logits(state) for state in states]


def changed(name: str, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of a golden checkpoint whose config says something else."""
    copy = Path(shutil.copytree(GOLDEN / "models" / name, folder))
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | changes))
    return copy


# --- the mask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 5, 99])
def test_windowed_mask_shows_each_token_the_last_of_its_past(window: int) -> None:
    position_ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    mask = ops.causal_mask(position_ids, torch.zeros(2, 1, 7, 4), window)
    for (row, step), position in np.ndenumerate(position_ids.numpy()):
        expected = [position - window < column <= position for column in range(7)]
        assert mask[row, 0, step].tolist() == expected


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("qwen2_sliding", ["LessOrEqual", "And", "And"]),
        ("qwen2_layer_types", ["And", "LessOrEqual"]),
        ("qwen2_linear", ["LessOrEqual", "LessOrEqual"]),
    ],
)
def test_each_kind_of_layer_has_one_mask_for_the_whole_graph(
    name: str, masks: list[str], phase: str, golden_bundle: Bundles
) -> None:
    graph = onnx.load(golden_bundle(name) / f"{phase}.onnx", load_external_data=False).graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    inputs = [node.input[3] for node in graph.node if node.op_type == "CachedAttention"]
    assert [made_by[value] for value in inputs] == masks
    assert len(set(inputs)) == len(set(masks))
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("LessOrEqual") == 1
    assert kinds.count("And") == kinds.count("Greater") == kinds.count("Sub") == (name in SLIDING)


# --- the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_streamed_layers_equal_the_whole_model(
    name: str, golden_checkpoint: Checkpoints, full_model: Callable[[str], Any]
) -> None:
    ids = np.arange(12 if name == "qwen2_dynamic" else 60) * 7 % 128
    expected = full_model(name)(torch.from_numpy(ids)[None]).logits[0].numpy()
    _, (found,) = streamed(golden_checkpoint(name), [ids])
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize("name", RECORDED)
def test_reference_agrees_with_the_stored_golden_logits(
    name: str, golden_checkpoint: Checkpoints, forward: dict[str, Array]
) -> None:
    _, (found,) = streamed(golden_checkpoint(name), [forward["ids1"][0]])
    assert error(found, forward[f"{name}_logits"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_left_padded_reference_agrees_with_the_stored_golden_logits(
    name: str, golden_checkpoint: Checkpoints, forward: dict[str, Array]
) -> None:
    mask = forward["mask_batch"] == 1
    rows = [ids[real] for ids, real in zip(forward["ids_batch"], mask, strict=True)]
    _, logits = streamed(golden_checkpoint(name), rows)
    found = np.stack([row[-1] for row in logits])
    assert error(found, forward[f"{name}_batch_last_logits"]) < 1e-5


@pytest.mark.parametrize(("name", "window"), SLIDING.items())
def test_wider_window_changes_the_reference_from_its_end_on(
    name: str, window: int, golden_checkpoint: Checkpoints
) -> None:
    ids = np.arange(20)
    reference, (exact,) = streamed(golden_checkpoint(name), [ids])
    _, (wide,) = streamed(golden_checkpoint(name), [ids], widened=1)
    assert reference.sliding_window == window
    assert np.array_equal(wide[:window], exact[:window])
    difference = np.abs(wide - exact)[window:].max(1)
    assert difference.min() > 0
    assert np.median(difference) > 0.1


def test_reference_of_a_model_that_does_not_slide_has_no_window(
    golden_checkpoint: Checkpoints,
) -> None:
    assert StreamedReference(golden_checkpoint("qwen2_linear")).sliding_window is None


# --- the graphs ---------------------------------------------------------------------------------


def runner_of(bundle: Path) -> OnnxRuntimeRunner:
    runner = OnnxRuntimeRunner(Bundle.open(bundle), decode_graph=True)
    runner.allocate(3, min(40, runner.limits.max_context))
    return runner


@pytest.mark.parametrize("name", RECORDED)
def test_graphs_agree_with_the_stored_golden_logits(
    name: str, golden_bundle: Bundles, forward: dict[str, Array]
) -> None:
    ids, expected = forward["ids1"][0], forward[f"{name}_logits"]
    runner = runner_of(golden_bundle(name))
    (whole,) = runner.prefill([0], [ids], [0], [20])
    chunks = [
        runner.prefill([1], [ids[past : past + 7]], [past], [len(ids[past : past + 7])])[0]
        for past in range(0, 20, 7)
    ]
    runner.prefill([2], [ids[:1]], [0], [1])
    steps = [runner.decode([2], [int(token)])[0].copy() for token in ids[1:]]
    runner.close()
    for found, wanted in (
        (whole, expected),
        (np.concatenate(chunks), expected),
        (np.stack(steps), expected[1:]),
    ):
        result = compare(found, wanted, tolerance=TOLERANCE)
        assert not result.failed.any(), result.errors.max()


@pytest.mark.parametrize("name", NAMES)
def test_ragged_rows_agree_with_the_stored_left_padded_batch(
    name: str, golden_bundle: Bundles, forward: dict[str, Array]
) -> None:
    mask = forward["mask_batch"] == 1
    rows = [ids[real] for ids, real in zip(forward["ids_batch"], mask, strict=True)]
    runner = runner_of(golden_bundle(name))
    logits = np.concatenate(runner.prefill(range(3), rows, [0] * 3, [1] * 3))
    runner.close()
    found = compare(logits, forward[f"{name}_batch_last_logits"], tolerance=TOLERANCE)
    assert not found.failed.any(), found.errors.max()


def test_token_beyond_the_reach_of_every_window_changes_nothing(tmp_path: Path) -> None:
    # Two layers of window 4 pass a token on by 3 places each.
    model = changed(
        "qwen2_layer_types", tmp_path / "model", {"layer_types": ["sliding_attention"] * 2}
    )
    runner = runner_of(build(model, tmp_path / "bundle", BuildOptions(verify=False)).path)
    ids = np.arange(16)
    other = np.concatenate(([99], ids[1:]))
    (exact,), (different,) = (runner.prefill([0], [row], [0], [16]) for row in (ids, other))
    runner.close()
    assert np.array_equal(exact[7:], different[7:])
    assert np.abs(exact - different)[:7].max(1).min() > 1e-3


# --- verification -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_golden_model_builds_with_parity_and_checks(
    name: str, golden_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    bundle = build(GOLDEN / "models" / name, tmp_path / "bundle")
    parity = bundle.manifest.parity
    assert parity.status == "passed"
    assert parity.max_logit_error is not None
    assert parity.max_logit_error < 2e-5
    assert parity.ties == 0
    report = json.loads((bundle.path / "parity.json").read_text())
    controls = {item["key"]: item for item in report["controls"]}
    assert all(item["detected"] and item["error"] > 0.1 for item in controls.values())
    assert (WIDE_WINDOW in controls) == (name in SLIDING)
    # Prompts, not only their answers, exceed the window.
    longest = max(len(item["tokens"]) for item in report["prompts"])
    assert longest > SLIDING.get(name, 0)
    assert check(bundle).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "changes"),
    [
        ("qwen2_sliding", "sliding_window", 7),
        ("qwen2_layer_types", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen2_linear", "rope_parameters", {"factor": 2.9}),
        ("qwen2_yarn_full", "rope_parameters", {"attention_factor": 1.2}),
        ("qwen2_yarn_full", "rope_parameters", {"factor": 4.1}),
        ("qwen2_llama3", "rope_parameters", {"factor": 7.9}),
    ],
)
def test_bundle_of_a_slightly_different_config_fails(
    name: str, key: str, changes: Any, golden_checkpoint: Checkpoints, tmp_path: Path
) -> None:
    raw = json.loads((GOLDEN / "models" / name / "config.json").read_text())
    value = raw[key] | changes if isinstance(changes, dict) else changes
    model = changed(name, tmp_path / "model", {key: value})
    bundle = build(model, tmp_path / "bundle", BuildOptions(verify=False))
    report = verify(bundle, golden_checkpoint(name))
    assert not report.passed
    if key == "sliding_window":
        assert min(item.position for item in report.departures) == SLIDING[name]


@pytest.mark.slow
def test_check_that_cannot_see_a_wider_window_fails(
    golden_bundle: Bundles, golden_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = StreamedReference.masks
    monkeypatch.setattr(StreamedReference, "masks", lambda self, real, _=0: masks(self, real))
    bundle = Bundle.open(golden_bundle("qwen2_sliding"))
    report = verify(bundle, golden_checkpoint("qwen2_sliding"))
    assert not report.passed
    assert f"the check is blind: with {WIDE_WINDOW}" in (report.first_departure or "")


@pytest.mark.slow
def test_window_that_no_row_exceeds_is_noted_and_its_control_left_out(
    build_bundle: Callable[..., Path], golden_checkpoint: Checkpoints
) -> None:
    checkpoint = golden_checkpoint("qwen2_layer_types")
    bundle = build_bundle(checkpoint.path, max_context=4)
    report = verify(Bundle.open(bundle), checkpoint)
    assert report.passed, report.first_departure
    (control,) = [item for item in report.controls if item.key == WIDE_WINDOW]
    assert control.note == "no row exceeds the window of 4 tokens"
    assert "no row exceeds the sliding window of 4 tokens" in report.notes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:--max-context")
def test_context_beyond_max_position_embeddings_is_verified_to_its_end(tmp_path: Path) -> None:
    model = GOLDEN / "models" / "qwen2_yarn_legacy"
    bundle = build(model, tmp_path / "bundle", BuildOptions(max_context=100, verify=False))
    report = verify(bundle, open_checkpoint(model))
    assert report.passed, report.first_departure
    assert max(len(item.tokens) + len(item.greedy_tokens) for item in report.prompts) == 100


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "window", "longest"),
    [(2048, 100, 460), (2048, 460, 476), (2048, 1000, 1016), (1010, 1000, 1009), (64, 63, 63)],
)
def test_some_row_exceeds_the_window(
    limit: int, window: int, longest: int, golden_bundle: Bundles
) -> None:
    bundle = Bundle.open(golden_bundle("qwen2_untied"))
    long = Bundle(bundle.path, replace(bundle.manifest, max_context=limit))
    chosen = make_prompts(long, window)
    plain = make_prompts(long)
    assert max(len(prompt.tokens) for prompt in chosen.prompts) == longest
    assert max(len(prompt.tokens) + prompt.steps for prompt in chosen.prompts) > window
    assert all(len(prompt.tokens) + prompt.steps <= limit for prompt in chosen.prompts)
    assert chosen.left_padded == plain.left_padded
    for ours, same in zip(chosen.prompts, plain.prompts, strict=False):
        assert np.array_equal(ours.tokens, same.tokens)


def test_window_as_long_as_the_context_is_noted(golden_bundle: Bundles) -> None:
    bundle = Bundle.open(golden_bundle("qwen2_untied"))
    chosen = make_prompts(bundle, 64)
    assert "no row exceeds the sliding window of 64 tokens" in chosen.notes
    assert len(chosen.prompts) == len(make_prompts(bundle).prompts)
