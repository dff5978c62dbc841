"""`qwen-export doctor` on this machine: what it reads and tries."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from exporter.doctor_machines import BUILD, RUN_CPU, WORKSTATION

from qwen_export.cli import main
from qwen_export.doctor.attempt import attempt
from qwen_export.doctor.examination import try_here
from qwen_export.doctor.machine import OnnxRuntime, Trial
from qwen_export.doctor.probe_graph import attention_model, expected_answer, probe_inputs


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


@pytest.fixture(scope="module")
def report(golden_bundle: Callable[[str], Path]) -> dict[str, Any]:
    """What the command says of this machine, and of a small bundle on it."""
    result = invoke(str(golden_bundle("qwen2_untied")), "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.slow
def test_doctor_finds_that_this_machine_builds_and_runs_on_the_cpu(
    report: dict[str, Any],
) -> None:
    found = {each["name"]: each for each in report["capabilities"]}
    assert found[BUILD]["can"]
    assert found[RUN_CPU]["can"]
    assert report["machine"]["packages"]
    assert report["machine"]["onnxruntime"]["version"] == metadata.version("onnxruntime")
    assert report["machine"]["onnxruntime"]["distributions"] == [
        f"onnxruntime {metadata.version('onnxruntime')}"
    ]


@pytest.mark.slow
def test_doctor_lets_a_bundle_answer(report: dict[str, Any]) -> None:
    (runs,) = report["bundle"]["capabilities"]
    assert runs["can"]
    assert "answered with a token" in runs["why"]


@pytest.mark.slow
def test_doctor_agrees_with_tensorrt_rtx_where_it_is_installed(report: dict[str, Any]) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    found = report["machine"]["tensorrt_rtx"]
    assert found["version"] == trt.__version__
    assert found["builds"]
    assert 89 in found["sms"]


def test_the_exit_status_follows_build_and_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, status in (
        (WORKSTATION, 0),
        (replace(WORKSTATION, onnxruntime=OnnxRuntime(())), 1),
        (replace(WORKSTATION, build=Trial(False, 1.0, "no torch")), 1),
        (replace(WORKSTATION, grammar=Trial(False, 1.0, "no llguidance")), 0),
    ):
        monkeypatch.setattr("qwen_export.doctor.examine", lambda machine=machine: machine)
        assert invoke().exit_code == status
        assert invoke("--json").exit_code == status


def test_with_a_bundle_the_exit_status_says_whether_it_runs_here(
    golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = str(golden_bundle("qwen2_untied"))
    serving = replace(WORKSTATION, build=Trial(False, 1.0, "no torch"))
    monkeypatch.setattr("qwen_export.doctor.examine", lambda: serving)
    result = invoke(bundle)
    assert result.exit_code == 0
    assert f"With {bundle}" in result.stdout
    broken = replace(serving, onnxruntime=OnnxRuntime(()))
    monkeypatch.setattr("qwen_export.doctor.examine", lambda: broken)
    assert invoke(bundle).exit_code == 1


def test_a_damaged_bundle_is_one_error(tmp_path: Path) -> None:
    result = invoke(str(tmp_path))
    assert result.exit_code == 1
    assert "must be a bundle, but has no manifest.json" in result.stderr


def test_the_probe_is_a_valid_onnx_model() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(attention_model())
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 24
    assert [node.op_type for node in model.graph.node] == ["Attention"]


def test_the_probe_answers_with_the_mean_value() -> None:
    values = probe_inputs()["value"][0, 0]
    np.testing.assert_array_equal(expected_answer()[0, 0, 1], (values[0] + values[1]) / 2)


# What is tried may be missing, fail, crash or hang


def shadow(folder: Path, module: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have child processes import this instead of the installed module."""
    (folder / f"{module}.py").write_text(textwrap.dedent(code), "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_a_missing_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')"
    shadow(tmp_path, "onnxruntime", code, monkeypatch)
    done = try_here("onnxruntime")
    assert done.missing == "onnxruntime"
    assert done.facts == {}


def test_a_library_that_crashes_costs_its_own_trial_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        import os
        __version__ = "9.9"
        class ComputeCapability:
            SM89 = 89
        class ILogger:
            def __init__(self):
                os.abort()
    """
    shadow(tmp_path, "tensorrt_rtx_bindings", code, monkeypatch)
    done = try_here("tensorrt-rtx")
    assert done.facts == {"version": "9.9", "sms": [89]}
    assert done.error is not None
    assert done.error.startswith("crashed (SIGABRT)")


def test_an_onnxruntime_that_computes_wrongly_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        import numpy as np
        __version__ = "1.31.1"
        def get_available_providers():
            return ["CPUExecutionProvider"]
        class SessionOptions:
            pass
        class InferenceSession:
            def __init__(self, model, options, providers):
                pass
            def run(self, names, feeds):
                return [np.zeros((1, 1, 2, 4), np.float32)]
    """
    shadow(tmp_path, "onnxruntime", code, monkeypatch)
    done = try_here("onnxruntime")
    assert "runs_cpu" not in done.facts
    assert done.error is not None
    assert "computes an attention wrongly" in done.error


def test_tensorrt_rtx_is_tried_without_the_packages_of_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    for module in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "rich"):
        shadow(tmp_path, module, f"raise ModuleNotFoundError(name={module!r})", monkeypatch)
    assert try_here("tensorrt-rtx").facts["builds"] is True


def test_what_hangs_is_ended() -> None:
    code = "import time; print('{\"begun\": true}', flush=True); time.sleep(60)"
    done = attempt([sys.executable, "-c", code], timeout_s=1.0)
    assert done.error == "did not end within 1 s"
    assert done.facts == {"begun": True}
    assert done.seconds < 30


def test_an_exit_status_comes_with_the_last_words() -> None:
    code = "import sys; sys.exit('no space left')"
    assert attempt([sys.executable, "-c", code], timeout_s=30.0).error == (
        "ended with exit status 1: no space left"
    )


def test_what_libraries_print_is_no_report() -> None:
    code = "print('hello'); print('3'); print('{\"version\": \"1\"}'); print('{\"cut')"
    done = attempt([sys.executable, "-c", code], timeout_s=30.0)
    assert done.facts == {"version": "1"}
    assert done.error is None
