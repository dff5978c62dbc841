"""Memory of plans against what builds and runs then take."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_export.bundle import embedded_model
from qwen_export.checkpoint import open_checkpoint
from qwen_export.planning import Plan, PlanOptions, plan
from qwen_export.planning.build_memory import verify_peak
from qwen_export.planning.memory import Layout, run_memory
from qwen_export.planning.sizes import StoredBytes, packed_cache_bytes
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine.prefix import KEPT_SLOTS

BANDWIDTH = 20e9

# Answers so many prompts of a length that differ, then prints the resident bytes.
RUN = """
import sys, numpy as np
from qwen_runtime import LLM
length = int(sys.argv[2])
rng = np.random.default_rng(0)
with LLM(sys.argv[1]) as llm:
    for _ in range(int(sys.argv[3])):
        prompt = rng.integers(0, 4000, length - 2).tolist()
        llm.generate(prompt, max_new_tokens=2, do_sample=False)
    status = dict(line.split(":") for line in open("/proc/self/status"))
    print(int(status["VmRSS"].split()[0]) * 1024)
"""


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reads 20 GB/s, without the second it takes to find out."""
    monkeypatch.setattr("qwen_export.planning.planner.read_bandwidth", lambda _: BANDWIDTH)


def plan_fp32(model: Path, **options: Any) -> Plan:
    return plan(model, PlanOptions(("fp32",), ("fp32",), **options))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("context", [300, 2048])
def test_memory_of_an_llm_that_keeps_prompts_is_within_a_tenth_of_the_plan(
    context: int, embedded_bundle: Path
) -> None:
    (entry,) = plan_fp32(embedded_model(), contexts=(context,)).precisions
    (use,) = entry.memory
    arguments = [str(embedded_bundle), str(context), str(KEPT_SLOTS + 1)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert use.total == pytest.approx(int(done.stdout), rel=0.1)


def test_caches_of_rows_and_kept_prompts_are_what_a_runner_takes(embedded_bundle: Path) -> None:
    made = plan_fp32(embedded_model(), contexts=(300,), batches=(1, 6))
    for use, slots in zip(made.precisions[0].memory, (KEPT_SLOTS, 6), strict=True):
        runner = OnnxRuntimeRunner(Bundle.open(embedded_bundle))
        runner.allocate(slots, 300)
        assert use.kv_cache + use.kept_prompts == runner.cache_bytes
        runner.close()


def test_outgrown_caches_count_where_prompts_are_kept_and_buffers_are_small() -> None:
    config = open_checkpoint(embedded_model()).config
    layout = Layout.of([StoredBytes("model.norm.weight", 1 << 20)], tied=True)
    settings: dict[str, Any] = {"limit": 1 << 20, "packed_cache": True}
    few, many = (
        run_memory(config, layout, context=512, batch=batch, **settings)
        for batch in (1, KEPT_SLOTS)
    )
    assert few.outgrown == few.kept_prompts > 0
    assert many.outgrown == many.kept_prompts == 0
    # The largest buffer has the keys of all slots of a layer.
    token = few.kv_cache // config.num_hidden_layers // 2 // 512
    assert (
        run_memory(config, layout, context=(32 << 20) // token, batch=1, **settings).outgrown == 0
    )
    for change in ({"packed_cache": False}, {"compute_dtype": "bf16"}):
        use = run_memory(config, layout, context=512, batch=1, **{**settings, **change})
        assert use.outgrown == 0


def test_an_engine_holds_a_tied_table_of_4_bits_twice() -> None:
    stored = [
        StoredBytes("model.embed_tokens.weight", 100, bits=4),
        StoredBytes("model.embed_tokens.weight_scale", 40, is_scale=True),
    ]
    assert Layout.of(stored, tied=True).head == 140
    assert Layout.of(stored, tied=True, compute_bytes=2).head == 2 * 100 + 20
    in_bytes = [replace(stored[0], bits=8), stored[1]]
    assert Layout.of(in_bytes, tied=True, compute_bytes=2).head == 100 + 20


def test_memory_grows_with_batch_and_context_alone_where_it_should() -> None:
    made = plan_fp32(embedded_model(), contexts=(512, 1024), batches=(1, 4))
    one, longer, four, _ = made.precisions[0].memory
    assert (one.batch, one.context, four.batch) == (1, 512, 4)
    assert longer.kv_cache == 2 * one.kv_cache
    assert four.kv_cache == 4 * one.kv_cache
    assert one.weights == longer.weights == four.weights
    assert longer.activations > one.activations


def test_an_engine_holds_two_bytes_a_value_and_no_scores() -> None:
    options = PlanOptions(("fp32",), ("fp32", "bf16"), contexts=(2048,))
    cpu, gpu = plan(embedded_model(), options).precisions[0].memory
    assert (cpu.device, gpu.device) == ("cpu", "gpu")
    assert gpu.kv_cache * 2 == cpu.kv_cache
    assert gpu.activations < cpu.activations / 2
    assert gpu.mapped == 0


def test_activations_of_the_graph_for_the_cpu_end_with_the_longest_call() -> None:
    config = open_checkpoint(embedded_model()).config
    layout = Layout.of([StoredBytes("model.norm.weight", 1 << 20)], tied=True)

    def activations(context: int, *, lowered: bool) -> int:
        return run_memory(
            config, layout, context=context, batch=1, limit=4096, lowered=lowered
        ).activations

    assert activations(256, lowered=True) < activations(512, lowered=True)
    assert activations(512, lowered=True) == activations(4096, lowered=True)
    assert activations(512, lowered=False) < activations(4096, lowered=False)


@pytest.mark.parametrize(
    ("precision", "layers", "measured"),
    [
        ("fp32", 2, 1975e6),
        ("fp32", 8, 3132e6),
        ("int8", 2, 1929e6),
        ("int8", 8, 2124e6),
        ("int4", 2, 1508e6),
        ("int4", 8, 1573e6),
    ],
)
def test_a_verified_build_of_the_half_billion_shape_peaks_within_a_tenth_of_the_plan(
    precision: str, layers: int, measured: float
) -> None:
    config = replace(
        open_checkpoint(embedded_model()).config,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        head_dim=64,
    )
    table, linears = 4 * 896 * 151_936, 59_700_000 * layers
    layout = Layout(linears, embedding=0, head=table, rotary=0, scales=0, tied=True)
    assert verify_peak(config, layout, precision=precision) == pytest.approx(measured, rel=0.1)


def test_large_quantised_weights_are_mapped_from_the_packed_cache() -> None:
    stored = [
        StoredBytes("model.embed_tokens.weight", 100 << 20, bits=8),
        StoredBytes("model.embed_tokens.weight_scale", 1 << 20, is_scale=True),
        StoredBytes("model.norm.weight", 1 << 20),
    ]

    # Codes that embed, as they are multiplied and packed; scales once more for sums; floats.
    def saved(stored: list[StoredBytes], weights: int, *, lowered: bool = False) -> int:
        return packed_cache_bytes(stored, weights, tied=True, lowered=lowered)

    assert saved(stored, 102 << 20) == (300 + 4 + 1) << 20
    assert saved(stored, 102 << 20, lowered=True) == (200 + 3 + 1) << 20
    assert saved(stored, 63 << 20) == 0
    assert saved(stored[2:], 102 << 20) == 0
    config = open_checkpoint(embedded_model()).config
    layout = Layout.of(stored, tied=True)
    packed, mapped = (
        run_memory(config, layout, context=64, batch=1, limit=64, packed_cache=cached)
        for cached in (False, True)
    )
    assert (mapped.weights, packed.total) == (0, mapped.total - mapped.outgrown)
    assert mapped.mapped > packed.mapped
