"""`qwen-export` as users call it: results, exit codes, messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from small_checkpoints import small_checkpoint

from qwen_export.cli import main

MODELS = Path(__file__).parents[1] / "data" / "golden" / "models"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of a small checkpoint, to be spoiled."""
    return Path(shutil.copytree(MODELS / "qwen2_untied", tmp_path / "checkpoint"))


def config_of(checkpoint: Path) -> dict[str, object]:
    return dict(json.loads((checkpoint / "config.json").read_text()))


def test_help_of_every_command_answers_without_importing_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from qwen_export.cli import main;"
        "names = ['', *main.commands];"
        "outs = [CliRunner().invoke(main, [*filter(None, [n]), '--help']).output for n in names];"
        "assert all(o.startswith('Usage:') for o in outs), outs;"
        "assert not {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_build_json_describes_the_bundle(checkpoint: Path, tmp_path: Path) -> None:
    result = run("build", checkpoint, "--output", tmp_path / "out", "--no-verify", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["bundle"] == str(tmp_path / "out")
    assert document["parity"]["status"] == "not_verified"
    assert document["operators"]["decode"]["qwen::CachedAttention"] == 2
    assert set(document["files"]) == {
        "decode.onnx",
        "generation_config.json",
        "prefill.onnx",
        "weights.bin",
    }


def test_build_says_how_large_the_bundle_is_and_that_it_was_not_verified(
    checkpoint: Path, tmp_path: Path
) -> None:
    result = run("build", checkpoint, "--output", tmp_path / "out", "--no-verify")
    assert result.exit_code == 0, result.output
    assert "parity was not verified (--no-verify)" in result.stdout


def test_inspect_shows_graphs_and_files(embedded_bundle: Path) -> None:
    result = run("inspect", embedded_bundle)
    assert result.exit_code == 0, result.output
    assert "qwen2: 8 layers, hidden 256, 8 heads, 2 key/value heads of 32" in result.stdout
    assert "in  past_key_values.0.key    float  [batch, 2, capacity, 32]  (and 15 more)" in (
        result.stdout
    )
    assert "weights.bin" in result.stdout


def test_an_existing_output_is_refused_and_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    result = run("build", checkpoint, "--output", output, "--no-verify")
    assert result.exit_code == 1
    assert "out exists; choose another --output or pass --overwrite" in result.stderr
    result = run("build", checkpoint, "--output", output, "--no-verify", "--overwrite")
    assert result.exit_code == 1
    assert "is not a bundle" in result.stderr
    assert (output / "precious.txt").read_text() == "mine"


def test_overwrite_replaces_a_bundle(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("build", checkpoint, "--output", tmp_path / "out", "--no-verify", "--json")
    assert run(*arguments).exit_code == 0
    result = run(*arguments, "--overwrite", "--max-context", "48")
    assert json.loads(result.stdout)["max_context"] == 48
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--precision", "int3", "'int3' is not one of 'fp32', 'int8', 'int4'"),
        ("--block-size", "48", "'48' is not one of '32', '64', '128'"),
        ("--quantizer", "hqq", "'hqq' is not one of 'rtn', 'search', 'gptq'"),
        ("--calibration", "missing.txt", "'missing.txt' does not exist"),
        ("--compute-dtype", "bf16", "--compute-dtype bf16 needs a --target"),
        ("--compute-dtype", "int8", "'int8' is not one of 'bf16', 'fp16', 'fp32'"),
        ("--max-context", "0", "0 is not in the range x>=1"),
    ],
)
def test_an_option_that_is_not_offered_is_refused_by_name(
    option: str, value: str, message: str, tmp_path: Path
) -> None:
    result = run("build", "--output", tmp_path / "out", option, value)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_wrong_usage() -> None:
    result = run("build", "--tiny")
    assert result.exit_code == 2
    assert "No such option" in result.stderr


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    result = run("build", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "is not a model folder: it has no config.json" in result.stderr


def test_an_unsupported_model_type_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    raw = config_of(checkpoint) | {"model_type": "llama"}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    result = run("build", checkpoint, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "model_type" in result.stderr
    assert "llama" in result.stderr


def test_truncated_safetensors_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = run("build", checkpoint, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(MODELS / "qwen2_sharded", tmp_path / "checkpoint"))
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    result = run("build", checkpoint, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "model-00002-of-00003.safetensors" in result.stderr


def test_nan_weights_stop_the_build_and_leave_nothing(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    spoiled = weights[name].copy()
    spoiled[3, 4] = float("nan")
    save_file({**weights, name: spoiled}, checkpoint / "model.safetensors")
    result = run("build", checkpoint, "--output", tmp_path / "out", "--no-verify")
    assert result.exit_code == 1
    assert f"{name} in model.safetensors must hold finite numbers" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_config_that_contradicts_the_tensors_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    raw = config_of(checkpoint) | {"intermediate_size": 64}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    result = run("build", checkpoint, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "expected" in result.stderr
    assert "got" in result.stderr
    assert "model.safetensors" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [2.0], "short_factor": [1.0]}},
            "rope_scaling.type 'longrope' is not supported",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor must be a number, got None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    change: dict[str, object], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / "config.json").write_text(json.dumps(config_of(checkpoint) | change))
    result = run("build", checkpoint, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.filterwarnings("always:--max-context")
def test_longer_context_than_the_model_was_made_for_is_a_warning(
    checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ("--max-context", "100", "--no-verify", "--json")
    result = run("build", checkpoint, "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert "Warning: --max-context 100 is more than the max_position_embeddings 64" in (
        result.stderr
    )
    assert json.loads(result.stdout)["max_context"] == 100


def test_longer_context_of_dynamic_rope_is_refused(tmp_path: Path) -> None:
    model = MODELS / "qwen2_dynamic"
    result = run("build", model, "--output", tmp_path / "out", "--max-context", "13")
    assert result.exit_code == 1
    assert "--max-context must be at most max_position_embeddings = 12" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_traceback_is_shown_on_request(tmp_path: Path) -> None:
    result = run("--traceback", "build", tmp_path, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "CheckpointError"


def test_verify_needs_the_checkpoint_of_a_bundle_built_from_a_folder(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert run("build", checkpoint, "--output", tmp_path / "out", "--no-verify").exit_code == 0
    result = run("verify", tmp_path / "out")
    assert result.exit_code == 2
    assert "MODEL is needed" in result.stderr


def test_a_quantised_build_is_described_verified_and_told_in_one_line(tmp_path: Path) -> None:
    model, out = small_checkpoint(tmp_path / "model"), tmp_path / "out"
    options = ("--precision", "int4", "--block-size", "32", "--quantizer", "rtn")
    result = run("build", model, "--output", out, *options)
    assert result.exit_code == 0, result.output
    assert "quantised, as served: " in result.stdout
    shown = json.loads(run("inspect", out, "--json").stdout)
    assert shown["quantization"]["method"] == "rtn"
    assert shown["parity"]["quality"]["positions"] > 100
    text = run("inspect", out).stdout
    assert "int4, block 32, rtn: 14 tensors" in text
    assert "quality       as served: " in text
    result = run("verify", out, model)
    assert result.exit_code == 0, result.output
    assert "parity passed" in result.stdout


def test_a_precision_that_quantises_nothing_takes_no_quantiser(
    checkpoint: Path, tmp_path: Path
) -> None:
    out = ("--output", tmp_path / "out")
    for options in (("--quantizer", "rtn"), ("--precision", "fp32", "--block-size", "64")):
        result = run("build", checkpoint, *out, *options)
        assert result.exit_code == 2
        assert "the precision is fp32; choose --precision int8 or int4" in result.stderr.replace(
            "\n", " "
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "int8", "--quantizer", "gptq"), "must be given together"),
        (("--precision", "int4", "--keep", "norm"), "--keep norm matches none of the 15 weights"),
    ],
)
def test_options_that_do_not_fit_are_wrong_usage(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    model = small_checkpoint(tmp_path / "model")
    result = run("build", model, "--output", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_help_and_documentation_name_the_defaults_of_quantisation() -> None:
    from qwen_export.formats import _DEFAULTS

    help_text = " ".join(run("build", "--help").stdout.split())
    blocks = ", ".join(f"{name} {options.block_size}" for name, options in _DEFAULTS.items())
    assert f"share a scale. [default: {blocks}, or the largest below that divides" in help_text
    (method,) = {options.method for options in _DEFAULTS.values()}
    assert f"quantised again. [default: {method}]" in help_text
    page = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text()
    rows = dict(
        (cell.strip(" `") for cell in line.split("|")[1:3])
        for line in page.splitlines()
        if line.startswith("| ")
    )
    assert rows["method"] == method
    for name, options in _DEFAULTS.items():
        assert rows[f"{name} block"] == str(options.block_size)


def test_verify_passes_for_its_checkpoint_and_fails_for_another(
    checkpoint: Path, tmp_path: Path
) -> None:
    assert run("build", checkpoint, "--output", tmp_path / "out", "--no-verify").exit_code == 0
    result = run("verify", tmp_path / "out", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    weights = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name] * 1.5}, checkpoint / "model.safetensors")
    result = run("verify", tmp_path / "out", checkpoint)
    assert result.exit_code == 1
    assert "fail" in result.stdout.lower()


def test_a_build_that_fails_parity_is_left_at_failed_and_refused_by_the_runtime(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_export import sources
    from qwen_runtime import Bundle, BundleError

    honest = sources.rotary_tables
    monkeypatch.setattr(sources, "rotary_tables", lambda *args: honest(*args)[::-1])
    result = run("build", checkpoint, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "does not answer like the original" in result.stderr
    assert not (tmp_path / "out").exists()
    failed = tmp_path / "out.failed"
    assert (failed / "parity.html").is_file()
    assert json.loads((failed / "manifest.json").read_text())["parity"]["status"] == "failed"
    with pytest.raises(BundleError, match="parity failed when it was built"):
        Bundle.open(failed)


def test_a_missing_dependency_is_named_with_the_extra_that_brings_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['qwen-export', 'build', '-o', "
        f"{str(tmp_path / 'out')!r}]; from qwen_export.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "torch is not installed; this command needs pip install 'qwen-export[export]'" in (
        done.stderr.replace("\n", " ")
    )
