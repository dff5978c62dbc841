"""Quantised bundles: the graph against its own weights, the served form against the original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.lowering import lower_bundle
from qwen_export.parity import verify
from qwen_export.parity.case_table import SERVED
from qwen_export.parity.observations import Observations
from qwen_export.parity.page import render
from qwen_export.parity.quality import Projected, Quality, measure_quality
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.check import CPU_BACKENDS, LOWERED_BACKEND, SERVED_BACKEND, check

MATMUL = "/model/layers.0/mlp/gate_proj/DequantizeLinear"
OTHER_SCALES = "model.layers.0.mlp.up_proj.weight_scale"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(small_checkpoint(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture(scope="module")
def built(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An int4 bundle with an odd vocabulary and a tied int8 table, verified."""
    # In larger blocks ONNX Runtime's kernels for one token and for many differ in the last bits.
    options = BuildOptions("int4", block_size=32)
    return build(model.path, tmp_path_factory.mktemp("int4") / "out", options)


@pytest.fixture
def copied(built: Bundle, tmp_path: Path) -> Callable[[Callable[[Path], Path]], Bundle]:
    """A copy with one file changed and listed again."""

    def copy(change: Callable[[Path], Path]) -> Bundle:
        folder = shutil.copytree(built.path, tmp_path / "bundle")
        changed = change(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        entry = {"sha256": sha256_of(changed), "num_bytes": changed.stat().st_size}
        manifest["files"][changed.name] = entry
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return Bundle.open(folder)

    return copy


def read_wrong_scales(folder: Path) -> Path:
    path = folder / "prefill.onnx"
    graph = onnx.load(path, load_external_data=False)
    (node,) = (node for node in graph.graph.node if node.name == MATMUL)
    node.input[1] = OTHER_SCALES
    onnx.save(graph, path)
    return path


def shuffle_codes(folder: Path) -> Path:
    """Every byte but those of floats somewhere else: a file that fits its graph and is wrong."""
    path = folder / "weights.bin"
    graph = onnx.load(folder / "prefill.onnx", load_external_data=False).graph
    memory = np.memmap(path, np.uint8, "r+")
    for tensor in graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.INT4):
            place = {entry.key: int(entry.value) for entry in tensor.external_data[1:]}
            codes = memory[place["offset"] : place["offset"] + place["length"]]
            np.random.default_rng(3).shuffle(codes)
    memory.flush()
    return path


def test_a_quantised_bundle_equals_the_original_with_its_own_weights(built: Bundle) -> None:
    parity = built.manifest.parity
    assert parity.status == "passed"
    assert parity.max_logit_error is not None
    assert parity.max_logit_error < 1e-5
    report = json.loads((built.path / "parity.json").read_text())
    assert all(control["detected"] for control in report["controls"])
    served = [item for item in report["invariants"] if item["name"].startswith("as served, ")]
    exact = [item for item in report["invariants"] if item not in served]
    assert all(item["bit_equal"] for item in served)
    assert {item["name"].removeprefix("as served, ") for item in served} >= {
        item["name"] for item in exact
    }
    assert any("copied prefix" in item["name"] for item in served)
    assert all(item["difference"] < 1e-4 for item in exact)


def test_quality_is_recorded_and_shown(built: Bundle) -> None:
    quality = built.manifest.parity.quality
    assert quality is not None
    assert 0 < quality.mean_kl < quality.max_kl
    assert 0.5 < quality.top1_agreement < 1
    assert 1e-4 < quality.served_error < 0.1 < quality.max_logit_error
    data = json.loads((built.path / "parity.json").read_text())["quality"]
    assert data["mean_kl"] == quality.mean_kl
    assert data["mean_kl"] < data["context_kl"]
    page = (built.path / "parity.html").read_text()
    assert "As it is served" in page
    assert f"{quality.top1_agreement:.1%}" in page


@pytest.mark.slow
def test_a_graph_that_reads_wrong_scales_fails(
    model: Checkpoint, copied: Callable[[Callable[[Path], Path]], Bundle]
) -> None:
    report = verify(copied(read_wrong_scales), model)
    assert not report.passed
    assert report.max_error > 0.01
    assert report.departures
    assert "above the tolerance" in (report.first_departure or "")


@pytest.mark.slow
def test_wrong_codes_fail_by_quality_though_the_graph_is_right(
    model: Checkpoint, copied: Callable[[Callable[[Path], Path]], Bundle]
) -> None:
    bundle = copied(shuffle_codes)
    lower_bundle(bundle, "cpu", overwrite=True)  # the one it has is of other weights
    report = verify(bundle, model)
    assert not report.departures
    assert not report.passed
    assert report.quality is not None
    assert "that ignoring the context would cost" in (report.quality.problem or "")
    assert "model.embed_tokens.weight, output 0 of 101" in (report.first_departure or "")
    assert "(and 15 more tensors)" in (report.first_departure or "")
    alone = replace(report, stored=replace(report.stored, departed=(), problem=None))
    assert not alone.passed
    assert alone.first_departure == report.quality.problem
    assert alone.summary().status == "failed"
    assert "embed_tokens.weight, output 0 of 101" in render(report)


def test_check_replays_exactly_and_as_served(built: Bundle) -> None:
    result = check(built)
    assert result.passed
    assert [replay.backend for replay in result.replays] == [*CPU_BACKENDS, LOWERED_BACKEND]
    assert result.max_error < 1e-5
    quality = built.manifest.parity.quality
    assert result.served is not None
    assert quality is not None
    assert result.served.backend == SERVED_BACKEND
    assert result.served.tolerance == 2 * quality.served_error
    assert result.served_mean_tolerance == 2 * quality.mean_served_error
    assert 1e-4 < result.served.max_error < result.served.tolerance
    assert result.served.mean_error < result.served_mean_tolerance


def test_check_fails_where_the_served_form_is_further_off_than_recorded(built: Bundle) -> None:
    parity = built.manifest.parity
    assert parity.quality is not None
    strict = replace(parity, quality=replace(parity.quality, served_error=1e-5))
    result = check(Bundle(built.path, replace(built.manifest, parity=strict)))
    assert not result.passed
    assert result.served is not None
    assert result.first_departure == result.served.first_departure
    assert SERVED_BACKEND in str(result.first_departure)


def with_errors(built: Bundle, largest: float, mean: float) -> Bundle:
    """The bundle, its build having measured other errors of int8 activations."""
    parity = built.manifest.parity
    assert parity.quality is not None
    quality = replace(parity.quality, served_error=largest, mean_served_error=mean)
    return Bundle(built.path, replace(built.manifest, parity=replace(parity, quality=quality)))


def test_check_fails_where_the_served_form_is_further_off_on_average(built: Bundle) -> None:
    result = check(with_errors(built, 0.2, 1e-5))
    assert not result.passed
    assert result.first_departure is None
    assert (result.problem or "").startswith(f"{SERVED_BACKEND}: mean logit error 0.0")


@pytest.mark.parametrize(("measured", "bound"), [(0.1, 0.2), (0.2, 0.25), (0.6, 0.6)])
def test_the_bound_of_the_served_form_stays_below_unrelated_logits(
    built: Bundle, measured: float, bound: float
) -> None:
    result = check(with_errors(built, measured, 0.2))
    assert result.served is not None
    assert result.served.tolerance == bound
    assert result.served_mean_tolerance == 0.25


# --- the measure --------------------------------------------------------------------------------


def measured(served: np.ndarray, original: np.ndarray, exact: np.ndarray) -> Quality:
    """Quality of logits [n, V], which serve as their own hidden states."""
    with Observations(original.shape[1]) as seen:
        # Out of order, as prefill and decode add them.
        for position in reversed(range(len(served))):
            seen.add(SERVED, 0, [position], served[position : position + 1])
        as_states = [
            Projected([torch.from_numpy(logits)], lambda states: states.numpy())
            for logits in (original, exact)
        ]
        return measure_quality(seen, *as_states)


@pytest.fixture
def logits(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 3, (40, 9)).astype(np.float32)


def test_equal_logits_have_perfect_quality(logits: np.ndarray) -> None:
    quality = measured(logits, logits, logits)
    assert (quality.positions, quality.top1_agreement) == (40, 1.0)
    assert (quality.mean_kl, quality.max_kl, quality.max_served_error) == (0, 0, 0)
    assert quality.context_kl > 1
    assert quality.problem is None


def test_divergence_is_that_of_the_definition(logits: np.ndarray) -> None:
    served, original, exact = logits[:2], logits[2:4], logits[4:6]

    def divergence(left: np.ndarray, right: np.ndarray) -> float:
        p, q = (np.exp(x) / np.exp(x).sum() for x in (left.astype(float), right.astype(float)))
        return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))

    quality = measured(served, original, exact)
    each = [divergence(original[i], served[i]) for i in range(2)]
    assert quality.mean_kl == pytest.approx(np.mean(each))
    assert quality.max_kl == pytest.approx(max(each))
    alone = [divergence(original[i], exact[i]) for i in range(2)]
    assert quality.exact_mean_kl == pytest.approx(np.mean(alone))
    average = np.mean([np.exp(row) / np.exp(row).sum() for row in original.astype(float)], axis=0)
    blind = [divergence(row, np.log(average)) for row in original]
    assert quality.context_kl == pytest.approx(np.mean(blind))


def test_answers_that_ignore_the_context_are_a_problem(logits: np.ndarray) -> None:
    blind = np.broadcast_to(logits.mean(axis=0), logits.shape)
    problem = measured(blind, logits, logits).problem
    assert problem is not None
    assert "nats from the original's on average, more than 0.5 times" in problem


def test_activations_that_cost_too_much_are_a_problem(logits: np.ndarray) -> None:
    far = logits + np.float32(0.6) * np.abs(logits).max(axis=1, keepdims=True)
    # A constant added to all logits leaves the distribution as it is.
    problem = measured(far, logits, logits).problem
    assert problem == (
        "rounding changes the logits that are served by 0.6 of the largest on average, more than "
        "0.25"
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_a_problem(logits: np.ndarray, bad: float) -> None:
    broken = logits.copy()
    broken[3, 3] = bad
    with np.errstate(invalid="ignore"):
        assert measured(broken, logits, logits).problem is not None
