"""engine.json and the folder it lies in, read without TensorRT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_documents import PLAN, description, write_engine

from qwen_runtime.bundle import Bundle
from qwen_runtime.engine_description import EngineDescription, EngineProfile, SizeEntry
from qwen_runtime.engine_file import EngineFolder, engine_names, refusal
from qwen_runtime.errors import BundleError

NAME = "tensorrt-rtx"


@pytest.fixture
def bundle(golden_bundle: Any, tmp_path: Path) -> Bundle:
    """A bundle of this test's own, with an engine built from it."""
    opened = Bundle.open(shutil.copytree(golden_bundle("qwen2_untied"), tmp_path / "bundle"))
    inputs = {name: opened.manifest.files[name].sha256 for name in ("prefill.onnx", "weights.bin")}
    write_engine(opened.path / "engines" / NAME, inputs=inputs)
    return opened


def folder(tmp_path: Path, **changes: Any) -> EngineFolder:
    return EngineFolder.read(write_engine(tmp_path / "bundle" / "engines" / NAME, **changes))


def test_a_description_survives_writing_and_reading(tmp_path: Path):
    written = description(sms=(86,), warnings=("slow",))
    (tmp_path / "engine.json").write_text(written.to_json())
    assert EngineDescription.read(tmp_path) == written


def test_phases_are_found_in_one_plan_or_in_two():
    one = description()
    (plan,) = one.plans
    assert one.profile("prefill") == (plan, 0)
    assert one.profile("decode") == (plan, 1)
    prefill = replace(plan, file="prefill.plan", profiles=plan.profiles[:1])
    decode = replace(
        plan,
        file="decode.plan",
        graph="decode",
        profiles=(EngineProfile("decode", {"batch": SizeEntry(1, 1, 8)}, None),),
    )
    two = description(plans=(prefill, decode))
    assert two.profile("decode") == (decode, 0)
    with pytest.raises(BundleError, match="a profile for decode must be listed"):
        description(plans=(prefill,)).profile("decode")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sms", [], "sms: .*non-empty"),
        ("compute_dtype", "fp32", "compute_dtype: 'fp32' is not one of"),
        ("capacity", 0, "capacity: 0 is less than the minimum of 1"),
        ("capacity", True, "capacity: True is not of type 'integer'"),
        ("parity", "passed", "parity: 'not_executed' was expected"),
        ("aliases", {"present.0.key": "input_ids"}, "aliases"),
        ("inputs", {"prefill.onnx": "abc", "weights.bin": "def"}, "inputs.*does not match"),
        ("colour", "red", r"'colour' was unexpected"),
    ],
)
def test_a_description_that_breaks_the_schema_is_refused(
    tmp_path: Path, field: str, value: object, message: str
):
    raw = json.loads(description().to_json()) | {field: value}
    (tmp_path / "engine.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match=message):
        EngineDescription.read(tmp_path)


def test_a_plan_outside_the_engines_folder_is_refused(tmp_path: Path):
    (plan,) = description().plans
    with pytest.raises(BundleError, match=r"file: '\.\./\.\./weights\.bin' does not match"):
        description(plans=(replace(plan, file="../../weights.bin"),)).to_json()


def test_a_newer_description_is_refused(tmp_path: Path):
    raw = json.loads(description().to_json()) | {"schema_version": 9}
    (tmp_path / "engine.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="schema_version must be at most 1, got 9"):
        EngineDescription.read(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_missing_or_unreadable_description_is_refused(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "engine.json").write_text(text)
    with pytest.raises(BundleError, match=r"engine\.json"):
        EngineDescription.read(tmp_path)


def test_a_bundle_lists_its_finished_engines(bundle: Bundle):
    (bundle.path / "engines" / f".{NAME}.building-1-a-1").mkdir()
    (bundle.path / "engines" / "empty").mkdir()
    assert engine_names(bundle.path) == (NAME,)
    assert engine_names(bundle.path / "nowhere") == ()
    assert EngineFolder.open(bundle, NAME).description.capacity == 256


def test_an_engine_that_is_not_there_says_how_to_build_it(bundle: Bundle):
    with pytest.raises(
        BundleError, match=r"has no engine 'tensorrt'.*tensorrt-rtx.*--target tens"
    ):
        EngineFolder.open(bundle, "tensorrt")


def test_an_engine_of_another_bundle_is_refused(bundle: Bundle):
    shutil.rmtree(bundle.path / "engines")
    write_engine(bundle.path / "engines" / NAME)
    with pytest.raises(
        BundleError, match=r"this bundle's prefill\.onnx, but .* qwen-export engin"
    ):
        EngineFolder.open(bundle, NAME)


@pytest.mark.parametrize(
    ("data", "message"), [(None, "the file is missing"), (PLAN[1:], "size must be 4 bytes, got 3")]
)
def test_a_plan_of_another_size_is_refused_at_once(
    bundle: Bundle, data: bytes | None, message: str
):
    path = bundle.path / "engines" / NAME / "engine.plan"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BundleError, match=message):
        EngineFolder.open(bundle, NAME)


def test_a_changed_plan_is_found_by_its_hash(bundle: Bundle):
    engine = EngineFolder.open(bundle, NAME)
    read: list[int] = []
    engine.check_hashes(read.append)
    assert sum(read) == len(PLAN)
    (engine.path / "engine.plan").write_bytes(b"plam")
    with pytest.raises(BundleError, match=r"engine\.plan: sha256 must be .* build it again: qwen"):
        engine.check_hashes()


def test_an_engine_is_refused_on_another_release(tmp_path: Path):
    engine = folder(tmp_path)
    assert refusal(engine, "1.7.1.116", 86) is None
    why = refusal(engine, "1.7.2.1", 86)
    assert why is not None
    assert "the release of tensorrt-rtx that built it, 1.7.1.116, got 1.7.2.1" in why
    assert why.endswith(
        f"qwen-export engine {tmp_path / 'bundle'} --target tensorrt-rtx --compute-dtype bf16 "
        "--sms 80,86 --overwrite"
    )


@pytest.mark.parametrize(
    ("sm", "ending"),
    [
        (89, "--target tensorrt-rtx --compute-dtype bf16 --sms 80,86,89 --overwrite"),
        (75, "--target tensorrt-rtx --compute-dtype fp16 --sms 75,80,86 --overwrite"),
        (90, "75, 80, 86, 89, 120, 121 only: choose another GPU, or backend='onnxruntime'"),
    ],
)
def test_an_engine_is_refused_on_another_gpu(tmp_path: Path, sm: int, ending: str):
    why = refusal(folder(tmp_path), "1.7.1.116", sm)
    assert why is not None
    assert f"was built for SM 80, 86, but this GPU has SM {sm}" in why
    assert why.endswith(ending)


def test_an_enterprise_engine_is_built_again_where_it_runs(tmp_path: Path):
    engine = folder(
        tmp_path, flavour="tensorrt", version="11.4.0.1", options=("--target", "tensorrt")
    )
    why = refusal(engine, "11.4.0.1", 90)
    assert why is not None
    assert why.endswith("on this machine: " + engine.rebuild_command)
    assert engine.rebuild_command.endswith("--target tensorrt --overwrite")
