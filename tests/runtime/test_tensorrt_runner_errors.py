"""What a TensorRT runner refuses, and that nothing is left allocated when it does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_double import TensorRtDouble
from tensorrt_engines import add_engine, edit_plan, linked_bundle

from qwen_runtime import LLM
from qwen_runtime.backends.tensorrt import TensorRtRunner
from qwen_runtime.backends.tensorrt.nvidia import load_seam
from qwen_runtime.backends.tensorrt.opening import choose_engine
from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_file import EngineFolder
from qwen_runtime.errors import (
    BackendError,
    BundleError,
    CapacityError,
    QwenRuntimeError,
    RequestError,
)

PROMPT = np.arange(20)


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Bundle:
    return linked_bundle(golden_bundle("qwen2_untied"), tmp_path / "bundle")


def assert_refused(
    bundle: Bundle,
    folder: EngineFolder,
    device: TensorRtDouble,
    kind: type[QwenRuntimeError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        TensorRtRunner(bundle, folder, device)
    assert device.leaks() == {}


# --- this machine -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            {"cuda_versions": (0, 13050)},
            "NVIDIA driver for CUDA 13 is needed .* got none; install",
        ),
        ({"cuda_versions": (12040, 13050)}, r"must serve CUDA 13, got one for CUDA 12\.4; update"),
        ({"gpus": 0}, "a CUDA GPU is needed .*CUDA finds no GPU; check CUDA_VISIBLE_DEVICES"),
        (
            {"sm": 90},
            "was built for SM 80, 86, 89, 120, 121, but this GPU has SM 90; TensorRT-RTX",
        ),
        ({"sm": 75}, "this GPU has SM 75; build it again: qwen-export engine .* --sms 75,80,86"),
        ({"version": "1.8.0.1"}, r"built it, 1\.7\.1\.116, got 1\.8\.0\.1; build it again: qwen-"),
    ],
)
def test_a_machine_that_cannot_run_the_engine_is_told_why(
    bundle: Bundle, device: dict[str, Any], message: str
) -> None:
    folder = add_engine(bundle)

    assert_refused(bundle, folder, TensorRtDouble(**device), BackendError, message)


def test_a_driver_of_the_same_major_version_is_new_enough(bundle: Bundle) -> None:
    device = TensorRtDouble(cuda_versions=(13000, 13050))
    TensorRtRunner(bundle, add_engine(bundle), device).close()

    assert device.leaks() == {}


@pytest.mark.parametrize(
    ("reasons", "message"),
    [
        (("MALFORMED_ENGINE",), "the file is damaged; build it again: qwen-export engine"),
        (("VERSION_MISMATCH",), "another release of TensorRT built it; build it again"),
        (("UNSUPPORTED_CC",), "not built for this GPU; build it again"),
        (("OLD_CUDA_DRIVER",), "too old for it: update the driver$"),
        (("OLD_CUDA_RUNTIME",), "too old for it: update cuda-bindings$"),
        (("INSUFFICIENT_GPU_MEMORY",), "too little memory for it; build it again"),
        (("CUDA_ERROR",), "see `qwen-export doctor`$"),
        (("SOMETHING_NEW", "CUDA_ERROR"), "SOMETHING_NEW, and CUDA does not work here"),
    ],
)
def test_tensorrts_own_reasons_are_given_in_words(
    bundle: Bundle, reasons: tuple[str, ...], message: str
) -> None:
    folder = add_engine(bundle)

    assert_refused(
        bundle,
        folder,
        TensorRtDouble(invalid=reasons),
        BundleError,
        f"cannot run here: .*{message}",
    )


def test_missing_modules_name_the_extra_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, flavour in (("tensorrt_rtx_bindings", "tensorrt-rtx"), ("tensorrt", "tensorrt")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            message = rf"{module} must be installed .*pip install 'qwen-export\[{flavour}\]'"
            with pytest.raises(BackendError, match=message):
                load_seam(flavour)


def test_missing_cuda_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match=r"cuda\.bindings\.runtime must be installed"):
        load_seam("tensorrt-rtx")


# --- the bundle and its engine ------------------------------------------------------------------


def test_a_bundle_without_an_engine_says_how_to_build_one(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no engine 'tensorrt-rtx' .*qwen-export engine .* --t"):
        LLM(bundle, backend="tensorrt")


def test_the_engine_whose_tensorrt_is_installed_is_chosen(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_engine(bundle, name="tensorrt")
    assert choose_engine(bundle).description.flavour == "tensorrt"
    add_engine(bundle)
    for installed, expected in (
        (("tensorrt_rtx_bindings", "tensorrt"), "tensorrt-rtx"),
        (("tensorrt",), "tensorrt"),
        ((), "tensorrt-rtx"),
    ):
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, known=installed: name in known or None
        )
        assert choose_engine(bundle).description.flavour == expected


def test_a_damaged_plan_is_refused(bundle: Bundle) -> None:
    folder = add_engine(bundle)
    plan = folder.plan_file(folder.description.plans[0])
    content = plan.read_bytes()
    plan.write_bytes(b"onnx" + content[4:])
    assert_refused(bundle, folder, TensorRtDouble(), BundleError, "the file is damaged")

    plan.write_bytes(content[:-9] + b"{" * 9)
    assert_refused(
        bundle, folder, TensorRtDouble(), BackendError, "bad magic; build it again: qwen-export"
    )


def test_weights_that_do_not_fit_are_told_apart_from_damage(bundle: Bundle) -> None:
    folder = add_engine(bundle)
    plan = folder.plan_file(folder.description.plans[0])
    plan.write_bytes(plan.read_bytes()[:-9] + b"{" * 9)

    assert_refused(
        bundle,
        folder,
        TensorRtDouble(memory=512),
        BackendError,
        "needs 1000 bytes of GPU memory for its weights, got 512 free .*--precision int8 or int4",
    )


def drop_tensor(plan: dict[str, Any]) -> None:
    plan["tensors"] = [tensor for tensor in plan["tensors"] if tensor[0] != "past_lengths"]


def add_output(plan: dict[str, Any]) -> None:
    plan["tensors"].append(["hidden", False, "FLOAT", [-1, 32]])


def set_tensor(plan: dict[str, Any], name: str, dtype: str, shape: list[int] | None) -> None:
    for tensor in plan["tensors"]:
        if tensor[0] == name:
            tensor[2], tensor[3] = dtype, shape or tensor[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_tensor, r"must have the inputs of prefill\.onnx, but differs in past_lengths"),
        (add_output, r"must have the outputs of prefill\.onnx, but differs in hidden"),
        (lambda plan: set_tensor(plan, "logits", "BF16", None), "logits must be FLOAT, got BF16"),
        (lambda plan: set_tensor(plan, "input_ids", "INT32", None), "must be INT64, got INT32"),
        (
            lambda plan: set_tensor(plan, "present.1.key", "HALF", None),
            "all caches must have one type of BF16, HALF, FLOAT, got FLOAT, HALF",
        ),
        (
            lambda plan: set_tensor(plan, "present.1.key", "FLOAT", [-1, 2, 32, 8]),
            r"present\.1\.key must be \(-1, 2, 64, 8\), got \(-1, 2, 32, 8\)",
        ),
        (
            lambda plan: plan["aliases"].pop("present.0.value"),
            r"in place of past_key_values\.0\.value, but shares the memory of none",
        ),
        (
            lambda plan: plan["aliases"].update({"present.1.key": "past_key_values.0.key"}),
            r"in place of past_key_values\.1\.key, but shares the memory of past_key_values\.0",
        ),
        (
            lambda plan: plan["profiles"][0].update(input_ids=[[1, 1], [4, 32]]),
            r"the prefill profile must take input_ids from \(1, 1\) to \(4, 16\), got \(1, 1\) to",
        ),
        (
            lambda plan: plan["profiles"][1].update(input_ids=[[2, 1], [4, 1]]),
            r"the decode profile must take input_ids from \(1, 1\) to \(4, 1\), got \(2, 1\)",
        ),
        (
            lambda plan: plan["profiles"][0].update(logits_indices=[[1, 1], [4, 4]]),
            r"must take logits_indices from \(1, 1\) to \(4, 8\), got \(1, 1\) to \(4, 4\)",
        ),
    ],
)
def test_a_plan_that_is_not_what_engine_json_says_is_refused(
    bundle: Bundle, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    add_engine(bundle)
    folder = edit_plan(bundle, change)

    assert_refused(bundle, folder, TensorRtDouble(), BundleError, message)


def test_plans_with_different_caches_are_refused(bundle: Bundle) -> None:
    add_engine(bundle, separate=True)

    def to_half(plan: dict[str, Any]) -> None:
        for tensor in plan["tensors"]:
            if tensor[0].startswith(("past_key", "present")):
                tensor[2] = "HALF"

    folder = edit_plan(bundle, to_half, "decode.plan")

    assert_refused(bundle, folder, TensorRtDouble(), BundleError, "must have the same caches")


def test_a_capacity_that_leaves_slots_unaligned_is_refused(bundle: Bundle) -> None:
    folder = add_engine(bundle, capacity=31, max_sequence=8)

    assert_refused(
        bundle,
        folder,
        TensorRtDouble(),
        BackendError,
        "multiple of 256 bytes, got 1984 .*capacity",
    )


def test_an_alias_that_engine_json_lacks_is_refused(bundle: Bundle) -> None:
    folder = add_engine(bundle)
    raw = json.loads((folder.path / "engine.json").read_text())
    del raw["aliases"]["present.0.key"]
    (folder.path / "engine.json").write_text(json.dumps(raw))

    assert_refused(
        bundle,
        EngineFolder.open(bundle, "tensorrt-rtx"),
        TensorRtDouble(),
        BundleError,
        r"present\.0\.key must be written in place of an input",
    )


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt", "device": "cpu"}, 'device must be "cuda" for backend "tensorrt"'),
        (
            {"device": "gpu"},
            'device must be "cpu" or "cuda" for backend "onnxruntime", got \'gpu\'',
        ),
        ({"threads": 2, "device": "cuda"}, 'threads must be None for device "cuda", got 2'),
        ({"threads": 2, "backend": "tensorrt"}, 'threads must be None for backend "tensorrt"'),
        ({"backend": ["tensorrt"]}, 'backend must be "onnxruntime" or "tensorrt", got'),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(
    bundle: Bundle, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as error:
        LLM(bundle, **arguments)
    assert error.value.param in arguments


def test_tokens_beyond_the_capacity_are_refused_with_the_limit(bundle: Bundle) -> None:
    device = TensorRtDouble()
    runner = TensorRtRunner(bundle, add_engine(bundle, capacity=48), device)
    message = r"at most 48 tokens \(the capacity of .*tensorrt-rtx\), got {}; .*larger --capacity"
    runner.allocate(1, 48)

    with pytest.raises(CapacityError, match=message.format(49)):
        runner.allocate(1, 49)
    with pytest.raises(CapacityError, match=message.format(50)):
        runner.grow(50)
    with pytest.raises(CapacityError, match=message.format(55)):
        runner.prefill([0], [PROMPT], [35], [1])
    runner.prefill([0], [np.arange(48)], [0], [1])
    with pytest.raises(CapacityError, match=message.format(49)):
        runner.decode([0], [1])
    runner.close()
    with pytest.raises(BackendError, match="the runner is closed"):
        runner.prefill([0], [PROMPT], [0], [1])
    with pytest.raises(BackendError, match="the runner is closed"):
        runner.copy(0, 1, 1)
    assert device.leaks() == {}
