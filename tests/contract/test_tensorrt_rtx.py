"""The embedded model's graphs against TensorRT-RTX's own parser and builder; no GPU needed.

Missing bindings skip these tests on a developer's machine and fail them where ``CI`` is set.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import onnx_ir as ir
import pytest
from tensorrt_rtx import load_tensorrt

from qwen_export.bundle import BuildOptions, build
from qwen_export.errors import TargetError
from qwen_export.progress import Advance
from qwen_export.targets.flavours import ALL_SMS
from qwen_export.targets.network import inspect_network
from qwen_export.targets.plan import Plan, PlanHeader
from qwen_export.targets.profiles import Profile, SizeRange
from qwen_export.targets.tensorrt import ParsedGraph, build_plan, engine_graph
from qwen_runtime.bundle import Bundle

LAYERS = 8
CAPACITY = 256
LIMIT_S = 60
"""For one build, all GPU generations; seconds."""
BATCH = SizeRange(1, 1, 8)
PREFILL = Profile.prefill(BATCH, SizeRange(1, 64, 128), SizeRange(1, 1, 8))
DECODE = Profile.decode(BATCH)
DECODE_GRAPH = Profile("decode", {"batch": BATCH})

BuildEngine = Callable[[str, str], Plan]


@pytest.fixture(scope="module")
def trt() -> ModuleType:
    return load_tensorrt()


@pytest.fixture(scope="module")
def engine(trt: ModuleType, tiny_bundle: Bundle) -> BuildEngine:
    """Builds each engine once: the prefill graph with two profiles, the decode graph with one."""
    plans: dict[tuple[str, str], Plan] = {}

    def build(phase: str, dtype: str) -> Plan:
        if (phase, dtype) not in plans:
            started = time.monotonic()
            plans[phase, dtype] = build_plan(
                trt,
                engine_graph(tiny_bundle, phase, dtype=dtype, capacity=CAPACITY),
                [PREFILL, DECODE] if phase == "prefill" else [DECODE_GRAPH],
                num_hidden_layers=LAYERS,
            )
            assert time.monotonic() - started < LIMIT_S
        return plans[phase, dtype]

    return build


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Builds the embedded model with quantised weights."""
    root = tmp_path_factory.mktemp("quantised")

    def bundle(precision: str) -> Bundle:
        if not (root / precision).exists():
            build(None, root / precision, BuildOptions(precision, verify=False))
        return Bundle.open(root / precision)

    return bundle


def graph(bundle: Bundle, phase: str = "decode", dtype: str = "bf16") -> ir.Model:
    return engine_graph(bundle, phase, dtype=dtype, capacity=CAPACITY)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def test_missing_bindings_skip_locally_and_fail_in_ci(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="TensorRT-RTX is not installed"):
        load_tensorrt()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="TensorRT-RTX is not installed"):
        load_tensorrt()


# --- engines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_attention_keeps_its_mask_and_every_cache_is_updated_in_place(engine, phase, dtype):
    plan = engine(phase, dtype)
    assert plan.network.num_attentions == LAYERS
    assert plan.network.aliases == {
        f"present.{layer}.{part}": f"past_key_values.{layer}.{part}"
        for layer in range(LAYERS)
        for part in ("key", "value")
    }
    assert plan.network.num_layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert plan.warnings == ()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_plan_holds_every_weight_once(engine, tiny_bundle, phase, dtype):
    plan = engine(phase, dtype)
    weights = tiny_bundle.path / "weights.bin"
    # What the norms multiply with stays float32 in fp16.
    assert plan.graph_weight_bytes <= 1.001 * weights.stat().st_size / 2
    assert 0.99 * plan.graph_weight_bytes <= plan.header.weight_bytes
    assert plan.header.weight_bytes <= 1.02 * plan.graph_weight_bytes


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_plan_serves_all_gpu_generations_of_this_release(trt, engine, phase):
    plan = engine(phase, "bf16")
    assert plan.header.sms == ALL_SMS
    assert ".".join(map(str, plan.header.version)) == trt.__version__
    assert plan.header.num_bytes == len(plan.data)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("precision", "packed"), [("int8", 0.28), ("int4", 0.17)])
def test_quantised_weights_stay_packed(trt, quantised, precision, packed, dtype):
    """``packed``: bytes against float32's. A table dequantised in advance would cost half of it."""
    bundle = quantised(precision)
    started = time.monotonic()
    plan = build_plan(
        trt, graph(bundle, "prefill", dtype), [PREFILL, DECODE], num_hidden_layers=LAYERS
    )
    assert time.monotonic() - started < LIMIT_S
    assert plan.header.sms == ALL_SMS
    assert plan.header.weight_bytes <= 1.02 * plan.graph_weight_bytes
    floats = 4 * 7_150_848
    assert plan.header.weight_bytes <= packed * floats
    assert plan.warnings == ()


def test_two_profiles_have_their_own_kernels_and_scratch_memory(engine):
    plan = engine("prefill", "bf16")
    assert len(plan.activation_bytes) == 2
    assert plan.activation_bytes[0] > plan.activation_bytes[1] > 0
    names = " ".join(kernel.name for kernel in plan.kernels)
    assert "_gemm_mha_v2" in names
    assert "_gemv_mha_v1" in names


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc/self/maps")
def test_float32_weights_are_given_back_when_they_have_been_cast(trt, tiny_bundle, tmp_path):
    # A bundle of its own: other tests of the process map the shared one.
    bundle = Bundle.open(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    parsed = ParsedGraph(trt, graph(bundle))
    assert parsed.weight_bytes > 14_000_000
    gc.collect()
    assert str(bundle.path) not in Path("/proc/self/maps").read_text()


# --- what must be refused ---------------------------------------------------------------------


def use_lengths_body(model: ir.Model) -> None:
    """Attention by lengths instead of a mask: valid ONNX that TensorRT reads without its lengths."""
    (function,) = model.functions.values()
    q, k, v, _, lengths = function.inputs
    (old,) = list(function)
    function.append(
        ir.node(
            "Attention",
            [q, k, v, None, None, None, lengths],
            attributes={"is_causal": 1},
            name="Attention",
        )
    )
    new = function[-1]
    new.outputs[0].name = "y"
    function.outputs[0] = new.outputs[0]
    function.remove(old)


def test_an_attention_by_lengths_is_refused(trt, tiny_bundle):
    model = graph(tiny_bundle)
    use_lengths_body(model)
    with pytest.raises(TargetError, match="an attention without its mask") as caught:
        build_plan(trt, model, [DECODE_GRAPH], num_hidden_layers=LAYERS)
    # Both the missing mask and the causal rule of each layer, which starts at slot 0.
    assert "is an attention with a causal rule, UPPER_LEFT" in str(caught.value)
    assert len(caught.value.names) == 2 * LAYERS


def test_lengths_are_dropped_without_a_warning(trt, tiny_bundle):
    """Why the network is inspected: parser and builder say nothing of what they drop."""
    model = graph(tiny_bundle)
    facts = inspect_network(trt, ParsedGraph(trt, model).network, num_hidden_layers=LAYERS)
    use_lengths_body(model)
    assert ParsedGraph(trt, model).build([DECODE_GRAPH], facts).warnings == ()


def test_another_number_of_attentions_is_refused(trt, tiny_bundle):
    with pytest.raises(TargetError, match="one attention for each of 9 layers, got 8"):
        build_plan(trt, graph(tiny_bundle), [DECODE_GRAPH], num_hidden_layers=LAYERS + 1)


def test_a_cache_that_is_not_the_input_itself_is_refused(trt, tiny_bundle):
    model = graph(tiny_bundle)
    scatter = node(model, "/model/layers.2/self_attn/TensorScatter")
    past = scatter.inputs[0]
    assert past is not None
    copy = ir.node("Add", [past, past], name="copy")
    copy.outputs[0].name, copy.outputs[0].dtype, copy.outputs[0].shape = (
        "copied",
        past.dtype,
        past.shape,
    )
    model.graph.insert_before(scatter, copy)
    scatter.replace_input_with(0, copy.outputs[0])
    with pytest.raises(TargetError, match="updates copied, which is not an input") as caught:
        build_plan(trt, model, [DECODE_GRAPH], num_hidden_layers=LAYERS)
    assert "/model/layers.2/self_attn/TensorScatter" in caught.value.names
    assert "present.2.key" in caught.value.names


def test_a_cache_that_is_not_an_output_is_refused(trt, tiny_bundle):
    model = graph(tiny_bundle)
    model.graph.outputs.remove(node(model, "/model/layers.1/self_attn/TensorScatter_1").outputs[0])
    with pytest.raises(TargetError, match=r"writes present\.1\.value, which is not an output"):
        build_plan(trt, model, [DECODE_GRAPH], num_hidden_layers=LAYERS)


def test_caches_under_each_others_names_are_refused(trt, tiny_bundle):
    model = graph(tiny_bundle)
    first, second = (
        node(model, f"/model/layers.{layer}/self_attn/TensorScatter") for layer in (3, 4)
    )
    left, right = first.inputs[0], second.inputs[0]
    first.replace_input_with(0, right)
    second.replace_input_with(0, left)
    with pytest.raises(
        TargetError, match=r"updates past_key_values\.4\.key and calls it present\.3\.key"
    ):
        build_plan(trt, model, [DECODE_GRAPH], num_hidden_layers=LAYERS)


def add_unused_input(model: ir.Model) -> None:
    shape = ir.Shape(["batch", CAPACITY])
    model.graph.inputs.append(ir.val("attention_mask", dtype=ir.DataType.BOOL, shape=shape))


def test_an_input_that_nothing_reads_is_refused(trt, tiny_bundle):
    model = graph(tiny_bundle)
    add_unused_input(model)
    with pytest.raises(TargetError, match="attention_mask is an input that nothing") as caught:
        build_plan(trt, model, [DECODE_GRAPH], num_hidden_layers=LAYERS)
    assert caught.value.names == ("attention_mask",)


def test_an_input_that_nothing_reads_is_refused_when_the_builder_warns(trt, tiny_bundle):
    model = graph(tiny_bundle)
    facts = inspect_network(trt, ParsedGraph(trt, model).network, num_hidden_layers=LAYERS)
    add_unused_input(model)
    with pytest.raises(TargetError, match=r"wrong numbers, TensorRT warns: .*Unused Input"):
        ParsedGraph(trt, model).build([DECODE_GRAPH], facts)


def test_a_builder_that_lives_hides_no_warning_of_another(trt, tiny_bundle):
    first = ParsedGraph(trt, graph(tiny_bundle))
    facts = inspect_network(trt, first.network, num_hidden_layers=LAYERS)
    model = graph(tiny_bundle)
    add_unused_input(model)
    second = ParsedGraph(trt, model)
    with pytest.raises(TargetError, match=r"TensorRT warns: .*Unused Input"):
        second.build([DECODE_GRAPH], facts)
    assert first.build([DECODE_GRAPH], facts).warnings == ()


def test_a_graph_the_parser_cannot_read_is_refused_with_its_node(trt, tiny_bundle):
    model = graph(tiny_bundle)
    scatter = node(model, "/model/layers.0/self_attn/TensorScatter")
    scatter.attributes["mode"] = ir.AttrString("mode", "circular")
    with pytest.raises(
        TargetError, match=r"cannot read TensorScatter .*Only linear mode"
    ) as caught:
        ParsedGraph(trt, model)
    assert "/model/layers.0/self_attn/TensorScatter" in caught.value.names


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (Profile("p", {"batch": BATCH, "sequence": BATCH}), "a size range to .*num_logits.* got"),
        (
            Profile("p", {**PREFILL.sizes, "capacity": BATCH}),
            "a size range to batch, sequence, num_logits",
        ),
        (
            Profile("long", {**PREFILL.sizes, "sequence": SizeRange(1, 64, 300)}),
            "sequence must not exceed the capacity of 256 tokens, got up to 300",
        ),
        (
            Profile("all", {**PREFILL.sizes, "num_logits": SizeRange(1, 65, 128)}),
            "num_logits must not exceed sequence, got 65 of 64 tokens as opt",
        ),
        (Profile.decode(SizeRange(1, 1, 1)), "batch must reach 2"),
    ],
)
def test_an_inconsistent_profile_is_refused_before_the_build(trt, tiny_bundle, profile, message):
    with pytest.raises(TargetError, match=message):
        build_plan(
            trt, graph(tiny_bundle, "prefill"), [PREFILL, profile], num_hidden_layers=LAYERS
        )


def test_a_profile_longer_than_the_cache_is_refused_when_the_builder_warns(trt, tiny_bundle):
    parsed = ParsedGraph(trt, graph(tiny_bundle, "prefill"))
    facts = inspect_network(trt, parsed.network, num_hidden_layers=LAYERS)
    long = Profile.prefill(BATCH, SizeRange(1, 64, 300), SizeRange(1, 1, 8))
    with pytest.raises(TargetError, match=r"TensorRT warns: .*not self-consistent"):
        parsed.build([long], facts)


def test_weights_stored_twice_are_refused_after_the_build(trt, tiny_bundle):
    parsed = ParsedGraph(trt, graph(tiny_bundle, "prefill"))
    facts = inspect_network(trt, parsed.network, num_hidden_layers=LAYERS)
    pinned = Profile.decode(SizeRange(1, 1, 1))
    with pytest.raises(TargetError, match="must hold every weight once, 14,301,696 bytes"):
        parsed.build([PREFILL, pinned], facts)


def test_the_builders_own_reason_is_given_when_it_refuses(trt, tiny_bundle):
    parsed = ParsedGraph(trt, graph(tiny_bundle))
    facts = inspect_network(trt, parsed.network, num_hidden_layers=LAYERS)
    with pytest.raises(TargetError, match=r"TensorRT cannot build the engine: .*profile"):
        parsed.build([], facts)


@pytest.mark.parametrize(
    ("dtype", "sms", "message"),
    [
        ("bf16", (80, 90), "SM must be one of 120, 121, 75, 80, 86, 89, got 90"),
        ("bf16", (75, 80), "bf16 needs SM 80 or newer, got 75"),
    ],
)
def test_gpu_generations_that_cannot_run_the_engine_are_refused(
    trt, tiny_bundle, dtype, sms, message
):
    with pytest.raises(TargetError, match=message):
        build_plan(
            trt,
            graph(tiny_bundle, dtype=dtype),
            [DECODE_GRAPH],
            num_hidden_layers=LAYERS,
            sms=sms,
        )


@pytest.mark.slow
def test_int4_weights_are_refused_for_the_oldest_generation(trt, quantised):
    with pytest.raises(TargetError, match="int4 needs SM 80 or newer, got 75"):
        build_plan(
            trt,
            graph(quantised("int4"), dtype="fp16"),
            [DECODE_GRAPH],
            num_hidden_layers=LAYERS,
            sms=(75,),
        )


def test_an_interrupted_build_stops_and_leaves_the_next_one_alone(trt, tiny_bundle):
    parsed = ParsedGraph(trt, graph(tiny_bundle))
    facts = inspect_network(trt, parsed.network, num_hidden_layers=LAYERS)
    gained: list[int] = []

    @contextmanager
    def interrupting(label: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        def advance(amount: int) -> None:
            gained.append(amount)
            if len(gained) == 1:
                os.kill(os.getpid(), signal.SIGINT)

        yield advance

    with pytest.raises(KeyboardInterrupt):
        parsed.build([DECODE_GRAPH], facts, progress=interrupting)
    # A build that is left alone gains more than 80 percent in its own words.
    assert sum(gained) < 50
    build_plan(trt, graph(tiny_bundle), [DECODE_GRAPH], num_hidden_layers=LAYERS)


def test_a_builders_progress_reaches_the_end(trt, tiny_bundle):
    steps: dict[str, list[int]] = {}

    @contextmanager
    def recording(label: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        steps[label] = [0]
        yield steps[label].append
        assert total is not None
        assert 0.8 * total <= sum(steps[label]) <= total

    build_plan(
        trt, graph(tiny_bundle), [DECODE_GRAPH], num_hidden_layers=LAYERS, progress=recording
    )
    assert list(steps) == ["Casting weights", "Building the engine"]
    assert len(steps["Building the engine"]) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"ONNX" + data[4:], "must begin with TensorRT-RTX's header"),
        (lambda data: data[:40], "must begin with TensorRT-RTX's header"),
        (lambda data: data[:8] + b"\x09" + data[9:], "must have format 2, got 9"),
        (lambda data: data[:-1], r"must have \d+ bytes, got \d+"),
    ],
)
def test_a_damaged_plan_is_refused(engine, change, message):
    with pytest.raises(TargetError, match=message):
        PlanHeader.read(change(bytes(engine("decode", "bf16").data)))
