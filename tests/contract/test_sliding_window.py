"""Sliding layers in TensorRT-RTX: every attention keeps its own mask, in both phases."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from qwen_export.bundle import BuildOptions, build, embedded_model
from qwen_export.targets.profiles import Profile, SizeRange
from qwen_export.targets.tensorrt import build_plan, engine_graph
from qwen_runtime.bundle import Bundle

LAYERS = 8
BATCH = SizeRange(1, 1, 8)
PROFILES = {
    "prefill": [
        Profile.prefill(BATCH, SizeRange(1, 64, 128), SizeRange(1, 1, 8)),
        Profile.decode(BATCH),
    ],
    "decode": [Profile("decode", {"batch": BATCH})],
}


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    return importlib.import_module("tensorrt_rtx_bindings")


@pytest.fixture(scope="module")
def sliding_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded model, the upper half of whose layers sees 32 tokens."""
    folder = tmp_path_factory.mktemp("sliding")
    model = Path(shutil.copytree(embedded_model(), folder / "model"))
    raw = json.loads((model / "config.json").read_text())
    raw |= {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4}
    (model / "config.json").write_text(json.dumps(raw))
    return build(model, folder / "bundle", BuildOptions(verify=False))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_attention_of_a_sliding_model_keeps_its_mask(
    trt: ModuleType, sliding_bundle: Bundle, phase: str
) -> None:
    graph = engine_graph(sliding_bundle, phase, dtype="bf16", capacity=256)
    masks = [node.inputs[3] for node in graph.graph if node.op_type == "CachedAttention"]
    assert [mask is masks[0] for mask in masks] == [True] * 4 + [False] * 4
    assert len(set(masks)) == 2
    plan = build_plan(trt, graph, PROFILES[phase], num_hidden_layers=LAYERS)
    assert plan.network.num_attentions == LAYERS
    assert plan.warnings == ()
    # Fused kernels, one for each layer, and not a decomposition.
    fused = [kernel for kernel in plan.kernels if "_mha_" in kernel.name]
    assert len(fused) == LAYERS * len(PROFILES[phase])
