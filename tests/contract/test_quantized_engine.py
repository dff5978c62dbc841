"""Quantised graphs against TensorRT-RTX's own parser and builder; no GPU needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.passes.retype import COMPUTE_DTYPES, fix_capacity, retype
from qwen_export.passes.tables import dequantize_tables
from qwen_export.targets.profiles import Profile, SizeRange
from qwen_export.targets.tensorrt import build_plan
from qwen_runtime.bundle import Bundle

BATCH = SizeRange(1, 1, 4)
PROFILES = {
    "prefill": [Profile.prefill(BATCH, SizeRange(1, 8, 16), SizeRange(1, 1, 4))],
    "decode": [Profile("decode", {"batch": BATCH})],
}


@pytest.fixture(scope="module", params=["tied int4", "tied int8", "untied int8", "untied int4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    kind, precision = request.param.split()
    folder = tmp_path_factory.mktemp(kind)
    # Large enough that the padding of tensors in a plan does not count.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2048}
    model = small_checkpoint(folder / "model", tie_word_embeddings=kind == "tied", **sizes)
    return build(model, folder / "out", BuildOptions(precision, verify=False))


def lowered(bundle: Bundle, phase: str) -> ir.Model:
    graph = ir.load(bundle.path / f"{phase}.onnx")
    dequantize_tables(graph)
    return graph


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_an_engine_holds_quantised_weights_once(bundle: Bundle, phase: str) -> None:
    trt: Any = pytest.importorskip("tensorrt_rtx_bindings")
    graph = lowered(bundle, phase)
    fix_capacity(graph, 32)
    retype(graph, COMPUTE_DTYPES["bf16"])
    plan = build_plan(trt, graph, PROFILES[phase], num_hidden_layers=2)
    stored = (bundle.path / "weights.bin").stat().st_size
    table = 0
    if bundle.manifest.weights.tied and bundle.manifest.precision == "int4":
        # A constant for lookups and one for the MatMul: int4's order differs between them.
        table = 256 * 2048 // 2
    one_table = bundle.manifest.weights.tied and not table
    assert plan.network.num_layers["DEQUANTIZE"] == 14 + (1 if one_table else 2)
    # Codes keep their size, scales and other floats are halved.
    assert plan.graph_weight_bytes < stored + table


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_dequantising_tables_first_gives_the_same_logits(
    bundle: Bundle, phase: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    graph = lowered(bundle, phase)
    path = bundle.path / f"lowered-{phase}.onnx"
    ir.save(graph, path)
    onnx.checker.check_model(path, full_check=True)
    length = 5 if phase == "prefill" else 1
    feeds: dict[str, Any] = {
        "input_ids": rng.integers(0, 2048, (2, length)),
        "past_lengths": np.array([0, 3]),
        "logits_indices": np.tile(np.arange(length), (2, 1)),
    }
    cache = rng.standard_normal((2, 2, 16, 64), dtype=np.float32)
    logits = []
    for file in (bundle.path / f"{phase}.onnx", path):
        options = ort.SessionOptions()
        # fp32 activations: only one of the two graphs has its table in a fused kernel.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        session = ort.InferenceSession(file, options, ["CPUExecutionProvider"])
        inputs = {entry.name: feeds.get(entry.name, cache) for entry in session.get_inputs()}
        logits.append(session.run(["logits"], inputs)[0])
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-5 * np.abs(logits[0]).max())


def test_a_graph_of_floats_stays_as_it_is(embedded_bundle: Path) -> None:
    path = embedded_bundle / "decode.onnx"
    graph = ir.load(path)
    dequantize_tables(graph)
    assert [node.name for node in graph.graph] == [node.name for node in ir.load(path).graph]
