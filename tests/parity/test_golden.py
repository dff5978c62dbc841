"""The whole ladder through `build`: every golden model that can be exported, and the embedded one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from parity.conftest import GOLDEN
from parity.golden_models import SUPPORTED

from qwen_export.bundle import build, embedded_model
from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.errors import ParityError
from qwen_export.parity import verify
from qwen_export.parity.reference import StreamedReference
from qwen_runtime.bundle import Bundle
from qwen_runtime.check import check
from qwen_runtime.errors import BundleError


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_golden_model_builds_with_parity_and_checks(name: str, tmp_path: Path) -> None:
    bundle = build(GOLDEN / "models" / name, tmp_path / name)
    parity = bundle.manifest.parity
    assert parity.status == "passed"
    assert parity.max_logit_error is not None
    assert parity.max_logit_error < 2e-5
    assert parity.tokens_compared > 500
    result = check(bundle)
    assert result.passed, result.first_departure


@pytest.mark.slow
def test_embedded_model_verifies_with_every_case(embedded_bundle: Path) -> None:
    report = verify(Bundle.open(embedded_bundle), open_checkpoint(embedded_model()))
    assert report.passed, report.first_departure
    assert all(case.positions for case in report.cases)
    assert report.max_error < 2e-5
    assert all(item.bit_equal for item in report.invariants)
    assert report.notes == ()


@pytest.mark.slow
def test_build_that_fails_parity_leaves_its_report_and_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotary = StreamedReference.rotary
    monkeypatch.setattr(
        StreamedReference,
        "rotary",
        lambda self, rope, length: rotary(
            self, "wrong theta" if rope == "exact" else rope, length
        ),
    )
    output = tmp_path / "bundle"
    with pytest.raises(ParityError, match=r"prefill whole, prompt .*bundle\.failed"):
        build(GOLDEN / "models" / "qwen2_draft", output)
    assert not output.exists()
    failed = tmp_path / "bundle.failed"
    assert json.loads((failed / "parity.json").read_text())["passed"] is False
    assert "Parity failed" in (failed / "parity.html").read_text()
    with pytest.raises(BundleError, match="does not answer like its checkpoint"):
        Bundle.open(failed)


def test_model_with_a_tokenizer_is_asked_in_text(
    text_bundle: Path, golden_checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    report = verify(Bundle.open(text_bundle), golden_checkpoint("qwen2_text"))
    assert report.passed, report.first_departure
    assert {"unicode", "chat"} <= {prompt.kind for prompt in report.prompts}
    report.write(tmp_path)
    with np.load(tmp_path / "reference.npz") as file:
        assert "chat" in file["names"]
