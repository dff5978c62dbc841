"""lowered/cpu in a bundle: `build` makes it, `engine` makes it again, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.cli import main
from qwen_export.errors import OptionError, OutputError, ParityError, TargetError
from qwen_export.lowering import lower_bundle
from qwen_runtime.bundle import Bundle
from qwen_runtime.cli.main import main as run_main
from qwen_runtime.errors import BundleError
from qwen_runtime.llm import LLM
from qwen_runtime.lowered_file import LoweredFolder
from qwen_runtime.manifest import ParitySummary

HEADS_OF_12 = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 12,
    "num_attention_heads": 8,
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads the operators do not take."""
    return small_checkpoint(tmp_path_factory.mktemp("model") / "odd", **HEADS_OF_12)


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of int4 weights as the command builds it, not to be changed."""
    output = tmp_path_factory.mktemp("int4") / "out"
    result = run("build", model, "-o", output, "--precision", "int4", "--no-verify")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("Warning") == 0
    return output


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(built, tmp_path / "bundle"))


def test_build_puts_it_into_every_bundle_of_quantised_weights(built: Path, model: Path) -> None:
    folder = LoweredFolder.open(Bundle.open(built), "cpu")
    folder.check_hashes()
    assert [path.name for path in (built / "lowered").iterdir()] == ["cpu"]
    assert "lowered/cpu" in run("inspect", built).stdout
    bare = run("build", model, "-o", built.parent / "fp32", "--no-verify")
    assert bare.exit_code == 0, bare.output
    assert not (built.parent / "fp32" / "lowered").exists()


def test_the_target_may_be_named_and_changes_nothing(model: Path, tmp_path: Path) -> None:
    arguments = ("--precision", "int8", "--no-verify", "--target", "cpu", "--target", "cuda")
    result = run("build", model, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}/out/lowered/cpu: " in result.stdout
    made = Bundle.open(tmp_path / "out")
    assert LoweredFolder.open(made, "cpu").description.compute_dtype == "fp32"
    assert LoweredFolder.open(made, "cuda").description.compute_dtype == "bf16"


def test_floats_are_refused_for_it_before_anything_is_built(model: Path, tmp_path: Path) -> None:
    result = run("build", model, "-o", tmp_path / "out", "--target", "cpu")
    assert result.exit_code == 1
    assert "out must have int8 or int4 weights to be lowered for cpu, got fp32: its portable" in (
        result.stderr.replace("\n", " ")
    )
    assert "Tracing" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_type_of_a_gpu_needs_another_target_beside_it(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "int8", "compute_dtype": "bf16", "targets": ("cpu",)}
    with pytest.raises(OptionError, match="--compute-dtype bf16 needs a --target, the GPU engine"):
        build(model, tmp_path / "out", BuildOptions(**options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("default:.* has no graph of its own for the CPU:UserWarning")
def test_a_model_that_the_operators_do_not_take_has_the_portable_graphs_and_build_says_so(
    odd_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    result = run("build", odd_model, "-o", output, "--precision", "int8", "--no-verify")
    assert result.exit_code == 0, result.output
    (warning,) = (line for line in result.stderr.splitlines() if line.startswith("Warning"))
    assert warning.startswith(f"Warning: {output} has no graph of its own for the CPU, which runs")
    assert "GroupQueryAttention needs a head_dim that 8 divides, got 12" in warning
    assert not (output / "lowered").exists()
    with LLM(output) as llm:
        assert len(llm.generate([[1, 2, 3]], max_new_tokens=2)[0].token_ids) == 2


def test_such_a_model_is_an_error_where_the_target_was_named_and_the_bundle_stays(
    odd_model: Path, tmp_path: Path
) -> None:
    options = BuildOptions("int8", verify=False, targets=("cpu",))
    with pytest.raises(
        TargetError, match=r"out is complete, but it has no engine for cpu: Group.*, got 12"
    ):
        build(odd_model, tmp_path / "out", options)
    bundle = Bundle.open(tmp_path / "out")
    result = run("engine", bundle.path, "--target", "cpu")
    assert result.exit_code == 1
    assert "needs a head_dim that 8 divides, got 12" in result.stderr
    assert not (bundle.path / "lowered").exists()


def test_engine_makes_it_for_a_bundle_that_has_none(bundle: Bundle, built: Path) -> None:
    shutil.rmtree(bundle.path / "lowered")
    result = run("engine", bundle.path, "--target", "cpu", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)["engines"]["cpu"]
    assert (document["target"], document["attention"]) == ("cpu", "group_query")
    assert list(document["graphs"]) == ["prefill"]
    graph = "lowered/cpu/prefill.onnx"
    assert (bundle.path / graph).read_bytes() == (built / graph).read_bytes()
    bundle.check_hashes()


def test_it_is_made_again_only_with_overwrite(bundle: Bundle) -> None:
    graph = bundle.path / "lowered" / "cpu" / "prefill.onnx"
    sound = graph.read_bytes()
    graph.write_bytes(b"broken")
    refused = run("engine", bundle.path, "--target", "cpu")
    assert refused.exit_code == 1
    assert "lowered/cpu exists; pass --overwrite to make it again" in refused.stderr
    again = run("engine", bundle.path, "--target", "cpu", "--overwrite")
    assert again.exit_code == 0, again.output
    assert graph.read_bytes() == sound
    with pytest.raises(OutputError, match="pass --overwrite"):
        lower_bundle(bundle, "cpu")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--compute-dtype", "fp32"),
        ("--compute-dtype", "bf16"),
        ("--max-batch", "4"),
        ("--capacity", "128"),
        ("--max-sequence", "8"),
        ("--sms", "89"),
        ("--separate-engines",),
    ],
)
def test_options_of_a_gpu_are_wrong_usage_for_it(
    bundle: Bundle, arguments: tuple[str, ...]
) -> None:
    result = run("engine", bundle.path, "--target", "cpu", "--overwrite", *arguments)
    assert result.exit_code == 2
    message = f"{arguments[0]} has no use for --target cpu, whose graph takes any sizes"
    assert message in result.stderr.replace("\n", " ")


def test_a_type_may_be_given_where_cuda_is_a_target_too(bundle: Bundle) -> None:
    arguments = ("--target", "cpu", "--target", "cuda", "--compute-dtype", "fp16", "--overwrite")
    result = run("engine", bundle.path, *arguments)
    assert result.exit_code == 0, result.output
    assert LoweredFolder.open(bundle, "cuda").description.compute_dtype == "fp16"
    assert LoweredFolder.open(bundle, "cpu").description.compute_dtype == "fp32"
    sizes = run("engine", bundle.path, *arguments, "--capacity", "64")
    assert sizes.exit_code == 2
    assert "--capacity has no use for" in sizes.stderr


def test_engine_refuses_floats_and_leaves_nothing_behind(
    golden_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    floats = shutil.copytree(golden_bundle("qwen2_untied"), tmp_path / "floats")
    result = run("engine", floats, "--target", "cpu")
    assert result.exit_code == 1
    assert "must have int8 or int4 weights to be lowered for cpu, got fp32" in result.stderr
    assert not (floats / "lowered").exists()


def test_a_replaced_bundle_brings_its_own(bundle: Bundle, model: Path) -> None:
    options = BuildOptions("int8", verify=False)
    replaced = build(model, bundle.path, options, overwrite=True)
    assert LoweredFolder.open(replaced, "cpu").description.weights_sha256 == (
        replaced.manifest.files["weights.bin"].sha256
    )
    build(model, bundle.path, BuildOptions("fp32", verify=False), overwrite=True)
    assert not (bundle.path / "lowered").exists()


def test_a_bundle_that_fails_is_kept_with_it_and_is_verified_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed:
        passed, first_departure = False, "everything differs"

        def write(self, folder: Path) -> None:
            (folder / "parity.json").write_text("{}")

        def summary(self) -> ParitySummary:
            return ParitySummary("failed")

    def fail(bundle: Bundle, *_: object, **__: object) -> Failed:
        LoweredFolder.open(bundle, "cpu").check_hashes()
        return Failed()

    monkeypatch.setattr("qwen_export.parity.verify", fail)
    with pytest.raises(ParityError, match="everything differs"):
        build(model, tmp_path / "out", BuildOptions("int8"))
    failed = Bundle.open(tmp_path / "out.failed", allow_failed=True)
    LoweredFolder.open(failed, "cpu")
    assert not any(name.startswith("lowered") for name in failed.manifest.files)


# --- damaged graphs, at every door --------------------------------------------------------------


def remove(folder: Path) -> None:
    (folder / "prefill.onnx").unlink()


def cut(folder: Path) -> None:
    path = folder / "prefill.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def take_others(folder: Path) -> None:
    path = folder / "lowered.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"weights_sha256": "0" * 64}))


def break_document(folder: Path) -> None:
    (folder / "lowered.json").write_text('{"schema_version": 1}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"cpu/prefill\.onnx: the file is missing; the graphs are damaged: copy them"),
        (cut, r"cpu/prefill\.onnx: size must be \d+ bytes, got \d+; the graphs are damaged: copy"),
        (take_others, r"must be made for this bundle's weights\.bin, but were made for another;"),
        (break_document, r"cpu/lowered\.json"),
    ],
)
def test_damage_is_one_sentence_at_every_door(
    bundle: Bundle, model: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(bundle.path / "lowered" / "cpu")
    with pytest.raises(BundleError, match=message) as caught:
        LLM(bundle)
    sentence = str(caught.value)
    runtime = CliRunner()
    for result in (
        runtime.invoke(run_main, ["check", str(bundle.path)]),
        runtime.invoke(run_main, ["bench", str(bundle.path)]),
        run("verify", bundle.path, model),
    ):
        assert result.exit_code == 1, result.output
        assert f"Error: {sentence}" in result.stderr
    inspected = run("inspect", bundle.path)
    assert inspected.exit_code == 0
    assert sentence in inspected.stdout


def test_the_sentence_names_the_command_that_mends_it(bundle: Bundle) -> None:
    remove(bundle.path / "lowered" / "cpu")
    with pytest.raises(BundleError) as caught:
        LLM(bundle)
    command = str(caught.value).rpartition("make them again: ")[2]
    name, *arguments = command.split()
    assert name == "qwen-export"
    assert run(*arguments).exit_code == 0
    LLM(bundle).close()
