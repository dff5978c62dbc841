"""Plans against what builds and runs then show."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exporter.quantized_layouts import gptq as pack_gptq
from exporter.quantized_layouts import write_checkpoint
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build, embedded_model
from qwen_export.checkpoint import open_checkpoint
from qwen_export.errors import CheckpointError, ExportError, OptionError
from qwen_export.planning import Plan, PlanOptions, plan
from qwen_export.planning.settings import Setting
from qwen_export.planning.speed import expected_speed
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_file import lowered_names

MODELS = Path(__file__).parents[1] / "data" / "golden" / "models"
BANDWIDTH = 20e9


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reads 20 GB/s, without the second it takes to find out."""
    monkeypatch.setattr("qwen_export.planning.planner.read_bandwidth", lambda _: BANDWIDTH)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a small checkpoint, to be spoiled."""
    return Path(shutil.copytree(MODELS / "qwen2_untied", tmp_path / "checkpoint"))


def edit(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plan_fp32(model: Path, **options: Any) -> Plan:
    return plan(model, PlanOptions(("fp32",), ("fp32",), **options))


def setting(made: Plan, name: str) -> Setting:
    return next(entry for entry in made.settings if entry.name == name)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_disk_of_the_embedded_model_is_what_its_build_writes(embedded_bundle: Path) -> None:
    (entry,) = plan_fp32(embedded_model()).precisions
    assert entry.disk is not None
    assert entry.disk.weights == (embedded_bundle / "weights.bin").stat().st_size
    graphs = sum(
        (embedded_bundle / f"{phase}.onnx").stat().st_size for phase in ("prefill", "decode")
    )
    assert entry.disk.graphs == pytest.approx(graphs, rel=0.05)
    # This bundle was built without the reports that prove parity.
    unproved = entry.disk.total - 120_000
    assert unproved == pytest.approx(folder_bytes(embedded_bundle), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_have_the_planned_bytes(precision: str, tmp_path: Path) -> None:
    options = PlanOptions((precision,), ("fp32",), block_size=64)
    (entry,) = plan(embedded_model(), options).precisions
    folder = tmp_path / "bundle"
    build(None, folder, BuildOptions(precision, verify=False, block_size=64, quantizer="rtn"))
    assert entry.disk is not None
    assert entry.disk.weights == (folder / "weights.bin").stat().st_size
    graphs = folder_bytes(folder / "lowered") + sum(
        (folder / f"{phase}.onnx").stat().st_size for phase in ("prefill", "decode")
    )
    assert entry.disk.graphs == pytest.approx(graphs, rel=0.05)
    assert entry.disk.total - 120_000 == pytest.approx(folder_bytes(folder), rel=0.02)


@pytest.mark.parametrize(("head_dim", "lowered"), [(16, True), (12, False)])
def test_a_graph_for_the_cpu_is_planned_where_a_build_makes_one(
    head_dim: int, lowered: bool, tmp_path: Path
) -> None:
    model = small_checkpoint(tmp_path / "model", num_attention_heads=8, head_dim=head_dim)
    floats, codes = plan(model, PlanOptions(("fp32", "int8"), ("fp32",))).precisions
    assert (floats.lowered, codes.lowered) == (False, lowered)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is none
        made = build(model, tmp_path / "out", BuildOptions("int8", verify=False))
    assert lowered_names(made.path) == (("cpu",) if lowered else ())


@pytest.mark.parametrize("name", ["qwen2_untied", "qwen3_tied_bias", "qwen2_sliding"])
def test_weights_of_golden_models_have_the_planned_bytes(
    name: str, golden_bundle: Callable[[str], Path]
) -> None:
    made = plan_fp32(MODELS / name)
    (entry,) = made.precisions
    bundle = golden_bundle(name)
    assert entry.disk is not None
    assert entry.disk.weights == (bundle / "weights.bin").stat().st_size
    assert made.max_context == Bundle.open(bundle).manifest.max_context


def test_a_step_of_the_graph_for_the_cpu_reads_the_tokens_it_has_and_no_more() -> None:
    options = PlanOptions(("int8",), ("fp32",), contexts=(300, 301))
    (entry,) = plan(embedded_model(), options).precisions
    fewer, more = entry.speed
    config = open_checkpoint(embedded_model()).config
    token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert more.bytes_per_token - fewer.bytes_per_token == token
    assert more.expected < fewer.expected < fewer.ceiling


@pytest.mark.parametrize("context", [128, 2048, 32768])
@pytest.mark.parametrize("bandwidth", [5e9, 30e9, 300e9])
def test_no_step_is_faster_than_its_bytes_are_read(context: int, bandwidth: float) -> None:
    config = open_checkpoint(embedded_model()).config
    config = replace(config, num_key_value_heads=config.num_attention_heads)
    token = 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    speed = expected_speed(
        config,
        10_000_000,
        context * token,
        precision="int8",
        context=context,
        bandwidth=bandwidth,
        lowered=True,
    )
    assert speed.expected < speed.ceiling


def test_speed_follows_the_bytes_of_a_step() -> None:
    options = PlanOptions(compute_dtypes=("fp32",), contexts=(1024,))
    made = plan(embedded_model(), options)
    fp32, int8, int4 = (entry.speed[0] for entry in made.precisions)
    assert fp32.ceiling == BANDWIDTH / fp32.bytes_per_token
    assert fp32.expected < fp32.ceiling
    assert fp32.expected < int8.expected < int4.expected
    # Every float once, the tied table included, the rotary tables not, and the caches.
    disk = made.precisions[0].disk
    assert disk is not None
    caches = made.precisions[0].memory[0].kv_cache
    rotary = 2 * 2048 * 16 * 4
    assert fp32.bytes_per_token == pytest.approx(disk.weights - rotary + caches, rel=1e-3)


def test_a_block_size_that_does_not_divide_is_said_for_that_precision_alone() -> None:
    made = plan(MODELS / "qwen2_untied", PlanOptions(("fp32", "int4"), block_size=128))
    fp32, int4 = made.precisions
    assert fp32.refusal is None
    assert "block size of 128 must divide" in str(int4.refusal)
    assert int4.disk is None


def test_an_unsupported_model_is_described_and_refused(checkpoint: Path) -> None:
    edit(checkpoint, model_type="llama")
    made = plan(checkpoint)
    assert "model_type 'llama' is not supported" in str(made.refusal)
    assert made.num_parameters > 0
    assert setting(made, "model_type").value == '"llama"'
    assert made.precisions == ()


def test_a_checkpoint_without_weights_is_refused_with_its_settings(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    made = plan(checkpoint)
    assert "holds no weights" in str(made.refusal)
    assert setting(made, "head_dim").value


def test_a_damaged_header_is_one_sentence(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="must begin with the header of a safetensors file"):
        plan(checkpoint)


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist, and is not a hub id"):
        plan(tmp_path / "none")


def test_traps_in_the_settings_are_marked(checkpoint: Path) -> None:
    edit(checkpoint, use_sliding_window=False, sliding_window=64, eos_token_id=7, odd_key=1)
    (checkpoint / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 9], "repetition_penalty": 1.1})
    )
    made = plan_fp32(checkpoint)
    for name, value, note in (
        ("sliding_window", "off", "64 is written, but use_sliding_window is false"),
        ("eos_token_id", "7, 9", "config.json says 7"),
        ("generation defaults", "repetition_penalty 1.1", "greedy"),
        ("other keys", "odd_key", "not obeyed"),
    ):
        found = setting(made, name)
        assert found.trap
        assert found.value == value
        assert note in found.note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ("fp8",)}, "--precision must be one of fp32, int8, int4, got 'fp8'"),
        ({"compute_dtypes": ("int8",)}, "--compute-dtype must be one of fp32, fp16, bf16"),
        ({"precisions": ("fp32",), "block_size": 32}, "--block-size, --quantizer and --keep need"),
        ({"quantizer": "gptq"}, "--quantizer gptq and --calibration FILE must be given together"),
        ({"batches": (1, 2, 1)}, "--batch 1 must be given once"),
        ({"contexts": (8, 8)}, "--context 8 must be given once"),
        ({"precisions": ("int4", "int4")}, "--precision int4 must be given once"),
        ({"block_size": 48}, "--block-size must be one of 32, 64, 128, got 48"),
        ({"contexts": (0,)}, "--context must be an integer >= 1, got 0"),
        ({"batches": (True,)}, "--batch must be an integer >= 1, got True"),
        ({"max_context": 1.5}, "--max-context must be an integer >= 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PlanOptions(**options)


def test_a_context_beyond_the_limit_says_what_to_raise() -> None:
    with pytest.raises(ExportError, match="--context must be at most 2048, the bundle's limit"):
        plan_fp32(embedded_model(), contexts=(4096,))


def test_calibration_adds_its_memory_to_the_build_and_nothing_else(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What a model reads is what its weights are fitted to. " * 400)
    options = PlanOptions(("int4",), ("bf16",))
    calibrated = replace(options, quantizer="gptq", calibration=text)
    plain, gptq = (plan(embedded_model(), each).precisions[0] for each in (options, calibrated))
    # transformers is loaded, and the Hessians of a layer: 2 of 256 inputs, one of 256, one of 768.
    assert gptq.build_peak - plain.build_peak > 300e6 + 4 * (3 * 256**2 + 768**2)
    assert gptq.disk == plain.disk
    longer = tmp_path / "longer.txt"
    longer.write_text(text.read_text() * 4)
    more = plan(embedded_model(), replace(calibrated, calibration=longer)).precisions[0]
    assert more.build_peak > gptq.build_peak


def test_a_quantised_checkpoint_is_not_calibrated(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("any")
    options = PlanOptions(("int4",), ("bf16",), quantizer="gptq", calibration=text)
    write_checkpoint(
        tmp_path / "m",
        pack_gptq(4, 16),
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False},
    )
    (entry,) = plan(tmp_path / "m", options).precisions
    assert "--quantizer gptq calibrates float weights" in str(entry.refusal)


def test_weights_that_are_kept_are_planned_in_fp32() -> None:
    options = PlanOptions(("int8",), ("bf16",))
    kept = replace(options, keep=("*.layers.0.*",))
    whole, partly = (plan(embedded_model(), each).precisions[0].disk for each in (options, kept))
    assert whole is not None
    assert partly is not None
    linears = (1_313_792 + 4_718_592) / 8
    assert partly.weights - whole.weights == pytest.approx(linears * (4 - 1 - 4 / 128), rel=0.01)


def test_a_pattern_that_keeps_nothing_is_named() -> None:
    (entry,) = plan(embedded_model(), PlanOptions(("int8",), ("bf16",), keep=("q",))).precisions
    assert "--keep q matches none" in str(entry.refusal)
