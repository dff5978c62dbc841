from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir
import pytest
from torch._subclasses.fake_tensor import FakeTensor

from qwen_export.checkpoint import ModelConfig, expected_tensors
from qwen_export.model.parameters import parameters
from qwen_export.trace import input_names, output_names, trace

MODELS = Path(__file__).parents[1] / "data" / "golden" / "models"
NAMES = ["qwen2_tied", "qwen2_untied", "qwen3_untied", "qwen3_tied_bias"]
ROTARY = {"model.rotary_emb.cos", "model.rotary_emb.sin"}
MAX_CONTEXT = 48


def config(name: str) -> ModelConfig:
    path = MODELS / name / "config.json"
    return ModelConfig.from_dict(json.loads(path.read_text()), path)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_checkpoints_tensors_and_the_rotary_tables(name):
    model = config(name)
    found = {
        each.name: each.shape[::-1] if each.transposed else each.shape
        for each in parameters(model, tied=model.tie_word_embeddings, max_context=MAX_CONTEXT)
    }
    table = (MAX_CONTEXT, model.head_dim // 2)
    assert {key: found.pop(key) for key in ROTARY} == dict.fromkeys(ROTARY, table)
    assert found == expected_tensors(model)


@pytest.mark.parametrize("name", NAMES)
def test_linear_weights_and_no_others_are_stored_transposed(name):
    model = config(name)
    for each in parameters(model, tied=model.tie_word_embeddings, max_context=MAX_CONTEXT):
        linear = each.name.endswith("_proj.weight") or each.name == "lm_head.weight"
        assert each.transposed == linear, each.name


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("qwen2_tied", "prefill"),
        ("qwen2_untied", "decode"),
        ("qwen3_untied", "prefill"),
        ("qwen3_tied_bias", "decode"),
    ],
)
def test_a_graph_names_exactly_the_parameters_and_holds_no_data(name, phase):
    model = config(name)
    tied = model.tie_word_embeddings
    wanted = {
        each.name: each.shape for each in parameters(model, tied=tied, max_context=MAX_CONTEXT)
    }
    graph = trace(model, phase, tied=tied, max_context=MAX_CONTEXT).graph
    assert {
        key: value.shape.numpy()
        for key, value in graph.initializers.items()
        if value.shape is not None and not key.startswith("constant.")
    } == wanted
    for key in wanted:
        value = graph.initializers[key]
        assert value.dtype == ir.DataType.FLOAT
        assert value.const_value is not None
        assert isinstance(value.const_value.raw, FakeTensor)
    layers = model.num_hidden_layers
    assert [value.name for value in graph.inputs] == input_names(phase, layers)
    assert [value.name for value in graph.outputs] == output_names(layers)
    cache = [model.num_key_value_heads, model.head_dim]
    assert str(graph.outputs[1].shape) == f"[batch,{cache[0]},capacity,{cache[1]}]"
    norms = [node.name for node in graph if "/self_attn/q_norm/" in (node.name or "")]
    assert len(norms) == (layers if model.qk_norm else 0)


def test_the_models_above_cover_a_head_dim_that_is_not_derived():
    models = [config(name) for name in NAMES]
    assert any(each.head_dim * each.num_attention_heads != each.hidden_size for each in models)
    assert {each.tie_word_embeddings for each in models} == {True, False}
    assert {each.qk_norm for each in models} == {each.qkv_bias for each in models} == {True, False}


def test_inputs_and_outputs_are_named_as_designed():
    assert input_names("prefill", 2) == [
        "input_ids",
        "past_lengths",
        "logits_indices",
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert input_names("decode", 1) == [
        "input_ids",
        "past_lengths",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert output_names(1) == ["logits", "present.0.key", "present.0.value"]


def test_threads_trace_one_after_the_other(monkeypatch):
    inside: list[int] = []
    most = []

    def example(*_):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        raise RuntimeError("enough")

    monkeypatch.setattr("qwen_export.trace._example", example)

    def run(_):
        with pytest.raises(RuntimeError, match="enough"):
            trace(config("qwen2_tied"), "decode", tied=True, max_context=MAX_CONTEXT)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    assert most == [1, 1, 1]


_MEASURE = """
import json, sys
from pathlib import Path
from qwen_export.checkpoint import ModelConfig
from qwen_export.trace import trace

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))

raw = json.loads(Path(sys.argv[1]).read_text())
peaks = []
for width in (1, 64):
    # 64 times as wide as the small model: a layer of Qwen2.5-72B, and its vocabulary.
    wide = raw | {
        "hidden_size": 128 * width, "intermediate_size": 462 * width, "vocab_size": 2376 * width,
        "num_attention_heads": width, "num_key_value_heads": max(1, width // 8), "head_dim": 128,
    }
    config = ModelConfig.from_dict(wide)
    for phase in ("prefill", "decode"):
        trace(config, phase, tied=False, max_context=32768)
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's VmHWM")
def test_tracing_allocates_no_weights():
    child = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(MODELS / "qwen2_untied" / "config.json")],
        capture_output=True,
        text=True,
        check=True,
    )
    narrow, wide = json.loads(child.stdout.splitlines()[-1])
    assert wide < 1_000_000, f"peak {wide} KB"
    # The wide model's smallest linear layer alone has 32 MB.
    assert wide - narrow < 30_000, f"{narrow} KB narrow, {wide} KB wide"
