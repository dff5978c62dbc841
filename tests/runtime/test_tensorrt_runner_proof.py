"""An engine is run against the bundle's reference once on each device, and refused if it differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorrt_double import TensorRtDouble
from tensorrt_engines import add_engine, linked_bundle

from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.backends.tensorrt import opening
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError, BundleError
from qwen_runtime.reference_data import ReferenceData

Load = Callable[[TensorRtDouble], int]


class Forgetful(TensorRtDouble):
    """A device whose engines read every past length as 0, as a lost mask or position does."""

    def _read(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        values = super()._read(address, shape, dtype)
        return np.zeros_like(values) if len(shape) == 1 else values


@pytest.fixture
def bundle(verified_bundle: Path, tmp_path: Path) -> Bundle:
    return linked_bundle(verified_bundle, tmp_path / "bundle")


@pytest.fixture
def load(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Opens the engine on a device; returns how many runs that took."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))

    def load_on(device: TensorRtDouble) -> int:
        monkeypatch.setattr(opening, "load_seam", lambda flavour: device)
        try:
            opening.open_tensorrt(bundle).close()
        finally:
            assert device.leaks() == {}
        return len(device.ran)

    return load_on


def proofs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "proofs").glob("*"))


@pytest.mark.parametrize("dtype", ["FLOAT", "HALF"])
def test_an_engine_is_proved_once(bundle: Bundle, load: Load, tmp_path: Path, dtype: str) -> None:
    add_engine(bundle, dtype=dtype)

    assert load(TensorRtDouble()) > 10
    assert load(TensorRtDouble()) == 0
    assert [path.suffix for path in proofs(tmp_path)] == [".json"]


def test_another_driver_gpu_or_engine_is_proved_again(
    bundle: Bundle, load: Load, tmp_path: Path
) -> None:
    folder = add_engine(bundle)
    assert load(TensorRtDouble()) > 0
    assert load(TensorRtDouble(cuda_versions=(13060, 13050))) > 0
    assert load(TensorRtDouble(sm=86)) > 0
    text = (folder.path / "engine.json").read_text()
    (folder.path / "engine.json").write_text(text.replace("2026-01-01", "2026-01-02"))
    assert load(TensorRtDouble()) > 0
    assert len(proofs(tmp_path)) == 4


def test_an_engine_that_answers_otherwise_is_refused_every_time(
    bundle: Bundle, load: Load, tmp_path: Path
) -> None:
    add_engine(bundle)
    for _ in range(2):
        with pytest.raises(BackendError, match="must answer like its checkpoint on Double, but"):
            load(Forgetful())
    assert proofs(tmp_path) == []


def test_the_refusal_says_where_it_departs_and_what_to_do(bundle: Bundle, load: Load) -> None:
    add_engine(bundle)
    message = r"prompt '.*', greedy step \d+: logit error .*build it again \(qwen-export engine .*"
    with pytest.raises(BackendError, match=message):
        load(Forgetful())


def test_no_record_is_kept_where_the_cache_is_off_or_cannot_be_written(
    bundle: Bundle, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_engine(bundle)
    (tmp_path / "file").write_text("")
    for folder in ("off", str(tmp_path / "file")):
        monkeypatch.setenv(CACHE_VARIABLE, folder)
        assert load(TensorRtDouble()) > 0
        assert load(TensorRtDouble()) > 0


def test_a_plan_that_was_changed_is_found_before_it_is_believed(
    bundle: Bundle, load: Load
) -> None:
    folder = add_engine(bundle)
    plan = folder.plan_file(folder.description.plans[0])
    plan.write_bytes(plan.read_bytes().replace(b'scratch": [8192', b'scratch": [8193'))
    with pytest.raises(BundleError, match=r"engine\.plan: sha256 must be .*build it again"):
        load(TensorRtDouble())


def test_a_bundle_without_a_reference_cannot_prove_an_engine(
    golden_bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = linked_bundle(golden_bundle("qwen2_untied"), tmp_path / "unverified")
    add_engine(bundle)
    device = TensorRtDouble()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(opening, "load_seam", lambda flavour: device)

    with pytest.raises(BundleError, match=r"no reference\.npz .*qwen-export verify"):
        opening.open_tensorrt(bundle)
    assert device.leaks() == {}


@pytest.mark.parametrize("capacity", [8, 40])
def test_a_small_engine_is_proved_as_far_as_it_has_room(
    bundle: Bundle, load: Load, capacity: int
) -> None:
    add_engine(bundle, capacity=capacity, max_sequence=8, max_num_logits=4)

    assert load(TensorRtDouble()) > 5
    with pytest.raises(BackendError, match="must answer like its checkpoint"):
        load(Forgetful(sm=86))


def test_an_engine_without_room_for_any_prompt_is_refused(
    bundle: Bundle, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_engine(bundle, capacity=8, max_sequence=8)
    read = ReferenceData.read

    def long_prompts(of: Bundle) -> ReferenceData:
        return ReferenceData(tuple(row for row in read(of).rows if len(row.prompt) > 20))

    monkeypatch.setattr(ReferenceData, "read", long_prompts)
    with pytest.raises(BackendError, match=r"--capacity must be at least 24 tokens .*got 8"):
        load(TensorRtDouble())


def test_a_proved_runner_begins_with_empty_slots(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_engine(bundle)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(opening, "load_seam", lambda flavour: TensorRtDouble())
    runner = opening.open_tensorrt(bundle)
    try:
        assert runner.num_slots > 0
        assert not runner._cache.lengths.any()
    finally:
        runner.close()
