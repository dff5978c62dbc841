"""`build` around its pipeline: what is recorded, and what becomes of a bundle that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from qwen_export import bundle
from qwen_export.bundle import BuildOptions, build
from qwen_export.checkpoint import open_checkpoint
from qwen_export.errors import ParityError
from qwen_export.parity import ladder, places
from qwen_runtime.bundle import Bundle
from qwen_runtime.manifest import ParitySummary

MODEL = Path(__file__).parents[1] / "data/golden/models/qwen2_tied"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FailedReport:
    """As much of a parity report as a build asks for."""

    passed: bool = False
    first_departure: str = "everything differs"

    def write(self, folder: Path) -> None:
        (folder / "parity.json").write_text("{}")

    def summary(self) -> ParitySummary:
        return ParitySummary("failed")


def fail_to_build(output: Path, monkeypatch: pytest.MonkeyPatch) -> ParityError:
    monkeypatch.setattr("qwen_export.parity.verify", lambda *_, **__: FailedReport())
    with pytest.raises(ParityError, match="everything differs") as caught:
        build(MODEL, output)
    return caught.value


def in_the_way(failed: Path, kind: str) -> Any:
    if kind == "dangling link":
        failed.symlink_to(failed.parent / "nowhere")
    else:
        failed.mkdir()
        (failed / ("manifest.json" if kind == "bundle" else "thesis.txt")).write_text("mine")


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["bundle"], "out.failed"),
        (["dangling link"], "out.failed-2"),
        (["folder", "bundle"], "out.failed-3"),
    ],
)
def test_a_failed_bundle_is_kept_and_nothing_of_others_is_lost(
    kinds: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    for name, kind in zip(("out.failed", "out.failed-2"), kinds, strict=False):
        in_the_way(tmp_path / name, kind)
    error = fail_to_build(output, monkeypatch)
    assert error.path == tmp_path / expected
    assert str(error).endswith(f"the bundle and its report are in {tmp_path / expected}")
    assert (tmp_path / expected / "parity.json").is_file()
    assert not output.exists()
    others = {"out.failed", "out.failed-2"} if expected != "out.failed" else set()
    assert {p.name for p in tmp_path.iterdir()} == {expected, *sorted(others)[: len(kinds)]}


def test_a_failure_is_told_where_its_bundle_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(bundle, "install", refuse)
    error = fail_to_build(tmp_path / "out", monkeypatch)
    assert error.path is None
    assert "could not be kept" in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_names_the_commit_it_was_built_from_and_all_its_dimensions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = replace(open_checkpoint(MODEL), revision=COMMIT)
    monkeypatch.setattr(bundle, "open_checkpoint", lambda *_, **__: fetched)
    built = build("acme/qwen", tmp_path / "out", BuildOptions(verify=False), revision="main")
    assert (built.manifest.source, built.manifest.revision) == ("acme/qwen", COMMIT)
    found = {
        (phase, dim.dim_param)
        for phase in ("prefill", "decode")
        for value in onnx.load(
            built.path / f"{phase}.onnx", load_external_data=False
        ).graph.value_info
        for dim in value.type.tensor_type.shape.dim
        if dim.dim_param
    }
    assert found == {
        *(("prefill", n) for n in ("batch", "sequence", "capacity", "num_logits")),
        ("prefill", "batch*num_logits"),
        *(("decode", n) for n in ("batch", "capacity")),
    }


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_runners_are_closed_when_a_case_raises(
    phase: str, golden_bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = places.OnnxRuntimeRunner.close

    def note(runner: places.OnnxRuntimeRunner) -> None:
        closed.append(runner)
        close(runner)

    def cases(*_: object) -> tuple[list[Any], list[Any]]:
        return [], []

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(places.OnnxRuntimeRunner, "close", note)
    monkeypatch.setattr(places, "prefill_cases", broken if phase == "prefill" else cases)
    monkeypatch.setattr(places, "decode_cases", broken)
    opened = Bundle.open(golden_bundle("qwen2_tied"))
    with pytest.raises(RuntimeError, match="broken"):
        ladder.verify(opened, open_checkpoint(MODEL))
    assert len(closed) == (1 if phase == "prefill" else 2)
