"""lowered/cuda in a bundle: the folder, the commands that make it, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.cli import main
from qwen_export.errors import OptionError, OutputError, TargetError
from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_export.lowering.inspect import inspect_lowered
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_file import LoweredFolder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(golden_bundle("qwen2_untied"), tmp_path / "bundle"))


def test_engine_adds_graphs_without_weights_and_leaves_the_core_alone(bundle: Bundle) -> None:
    result = run("engine", bundle.path, "--target", "cuda", "--compute-dtype", "fp16", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)["engines"]["cuda"]
    assert (document["compute_dtype"], document["attention"]) == ("fp16", "group_query")
    bundle.check_hashes()
    folder = LoweredFolder.open(bundle, "cuda")
    folder.check_hashes()
    weights = bundle.manifest.files["weights.bin"].num_bytes
    for phase in ("prefill", "decode"):
        for name, value in ir.load(folder.graph_file(phase)).graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                # Past the end: who forgets to give it is told so.
                assert tensor.offset == weights, name
    assert folder.remake_command.endswith("--target cuda --compute-dtype fp16 --overwrite")
    shown = run("inspect", bundle.path).stdout
    assert "lowered: lowered/cuda" in shown
    assert "fp16, GroupQueryAttention, over the bundle's weights; not executed" in shown


def test_graphs_that_exist_are_replaced_only_with_overwrite(bundle: Bundle) -> None:
    lower_bundle(bundle, "cuda")
    with pytest.raises(OutputError, match="pass --overwrite to make it again"):
        lower_bundle(bundle, "cuda")
    made = lower_bundle(bundle, "cuda", LoweringOptions("fp32"), overwrite=True)
    assert (made.description.compute_dtype, made.description.attention) == ("fp32", "mask")
    (bundle.path / "lowered" / "cuda" / "lowered.json").unlink()
    with pytest.raises(OutputError, match="holds no lowered graphs"):
        lower_bundle(bundle, "cuda", overwrite=True)


def test_graphs_of_other_weights_are_refused(
    bundle: Bundle, golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    made = lower_bundle(bundle, "cuda")
    other = Bundle.open(shutil.copytree(golden_bundle("qwen2_tied"), tmp_path / "other"))
    shutil.copytree(made.path, other.path / "lowered" / "cuda")
    with pytest.raises(Exception, match="must be made for this bundle's"):
        LoweredFolder.open(other, "cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compute-dtype", "int8"), "'int8' is not one of 'bf16', 'fp16', 'fp32'"),
        (("--max-batch", "4"), "--max-batch has no use for --target cuda"),
        (("--sms", "89"), "--sms has no use for --target cuda"),
        (("--separate-engines",), "--separate-engines has no use for --target cuda"),
    ],
)
def test_options_of_engines_are_wrong_usage_for_cuda(
    bundle: Bundle, arguments: tuple[str, ...], message: str
) -> None:
    result = run("engine", bundle.path, "--target", "cuda", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (bundle.path / "lowered").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compute_dtype": "bf16"}, OptionError, "bf16 needs a --target"),
        ({"compute_dtype": "int8"}, OptionError, "--compute-dtype must be one of"),
        (
            {"compute_dtype": "fp32", "targets": ("tensorrt-rtx",)},
            TargetError,
            "TensorRT has no float32 attention kernel",
        ),
    ],
)
def test_a_type_that_nothing_computes_in_is_refused_before_anything_is_built(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        build(None, tmp_path / "out", BuildOptions(**options))
    assert not (tmp_path / "out").exists()


def test_build_adds_graphs_for_cuda_in_the_type_asked_for(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model")
    result = run(
        *("build", folder, "--output", tmp_path / "out", "--no-verify"),
        *("--target", "cuda", "--compute-dtype", "fp32"),
    )
    assert result.exit_code == 0, result.output
    assert "fp32, attention under a mask" in result.stdout
    made = Bundle.open(tmp_path / "out")
    assert made.manifest.compute_dtype == "fp32"
    assert LoweredFolder.open(made, "cuda").description.compute_dtype == "fp32"


def test_a_head_that_the_operator_does_not_take_is_refused_by_its_size(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "model", hidden_size=48, num_attention_heads=4)
    bundle = build(folder, tmp_path / "out", BuildOptions(verify=False))
    with pytest.raises(TargetError, match="head_dim that 8 divides, got 12"):
        lower_bundle(bundle, "cuda")
    assert not (bundle.path / "lowered" / "cuda").exists()
    lower_bundle(bundle, "cuda", LoweringOptions("fp32"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("stranger", "must be one that is known to run there, but .* is ai.onnx::Shape"),
        ("cache", "must read and write the caches of layer 0"),
        ("unused", "every input must be used, but extra is not"),
        ("folded", "must read something beside weights"),
        ("missing", "a graph of 3 layers must have as many GroupQueryAttention, found 2"),
    ],
)
def test_a_graph_that_would_fall_back_or_answer_wrongly_is_found(
    bundle: Bundle, damage: str, message: str
) -> None:
    folder = lower_bundle(bundle, "cuda")
    graph = ir.load(folder.graph_file("decode")).graph
    num_layers = 3 if damage == "missing" else 2
    if damage == "stranger":
        graph.append(ir.node("Shape", [graph.inputs[0]], name="/stray/Shape"))
    elif damage == "cache":
        first, second = (node for node in graph if node.op_type == "GroupQueryAttention")
        keys = first.inputs[3], second.inputs[3]
        first.replace_input_with(3, keys[1])
        second.replace_input_with(3, keys[0])
    elif damage == "unused":
        graph.inputs.append(ir.val("extra", ir.DataType.INT64, ir.Shape([1])))
    elif damage == "folded":
        weight = next(iter(graph.initializers.values()))
        graph.append(ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name="/stray/Cast"))
    with pytest.raises(TargetError, match=message):
        inspect_lowered(graph, LoweringOptions(), "cuda", num_hidden_layers=num_layers)


@pytest.mark.parametrize(("num_top", "count"), [(64, 64), (256, 128), (0, None)])
def test_how_many_logits_a_step_brings_is_recorded(
    bundle: Bundle, num_top: int, count: int | None
) -> None:
    folder = lower_bundle(bundle, "cuda", LoweringOptions("fp32", num_top=num_top))
    entry = folder.description.graphs.get("top_logits")
    assert (
        (entry is None) == (count is None) == ("top_logits.onnx" not in folder.description.files)
    )
    if entry is not None:
        assert [output.shape[1] for output in entry.outputs] == [count, count]
        graph = ir.load(folder.graph_file("top_logits")).graph
        assert [node.op_type for node in graph] == ["TopK"]


@pytest.mark.parametrize("num_top", [-1, 257, True, 2.0])
def test_no_other_number_of_logits_is_taken(num_top: Any) -> None:
    with pytest.raises(TargetError, match=r"num_top must be an integer in 0\.\.256, got"):
        LoweringOptions(num_top=num_top)
