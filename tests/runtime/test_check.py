"""`check`: a bundle proves itself again without PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.check import (
    CPU_BACKENDS,
    SERVED_BACKEND,
    CheckDeparture,
    CheckResult,
    ReplayResult,
    check,
)
from qwen_runtime.errors import BundleError
from qwen_runtime.reference_data import REFERENCE_FILE, ReferenceData

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "models"
ONE_BACKEND = {"cpu": OnnxRuntimeRunner}


@pytest.fixture
def bundle_copy(verified_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(verified_bundle, tmp_path / "bundle"))


def rewrite_reference(folder: Path, **changes: Callable[[Any], Any]) -> Bundle:
    """Change arrays of reference.npz and list the new file in the manifest."""
    path = folder / REFERENCE_FILE
    with np.load(path) as file:
        arrays = dict(file)
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    np.savez_compressed(path, **arrays)
    return relist(folder, path)


def relist(folder: Path, path: Path) -> Bundle:
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"sha256": sha256_of(path), "num_bytes": path.stat().st_size}
    manifest["files"][path.name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def test_sound_bundle_passes_on_both_arrangements(verified_bundle: Path) -> None:
    bundle = Bundle.open(verified_bundle)
    result = check(bundle)
    assert result.passed
    assert result.first_departure is None
    assert result.num_files == len(bundle.manifest.files)
    assert [replay.backend for replay in result.replays] == list(CPU_BACKENDS)
    assert result.max_error < result.tolerance / 10
    rows = ReferenceData.read(bundle).rows
    assert {replay.positions for replay in result.replays} == {
        sum(len(row.steps) + 1 for row in rows)
    }


def test_changed_byte_is_named(bundle_copy: Path) -> None:
    with (bundle_copy / "weights.bin").open("r+b") as file:
        file.seek(100)
        file.write(b"\x01")
    with pytest.raises(BundleError, match=r"weights\.bin: sha256 must be"):
        check(Bundle.open(bundle_copy))


def test_bundle_that_answers_differently_names_the_first_departure(bundle_copy: Path) -> None:
    weights = bundle_copy / "weights.bin"
    memory = np.memmap(weights, np.float32, "r+")
    memory[: len(memory) // 2] *= 1.01
    memory.flush()
    result = check(relist(bundle_copy, weights), backends=ONE_BACKEND)
    assert not result.passed
    assert result.first_departure is not None
    assert result.first_departure.step == 0
    assert "cpu, prompt 'single token', greedy step 0" in str(result.first_departure)


def test_decode_that_loses_a_token_is_told_apart(verified_bundle: Path) -> None:
    class Forgetful(OnnxRuntimeRunner):
        def decode(self, slots: Any, tokens: Any) -> Any:
            for slot in slots:
                if self._cache.lengths[slot] == 30:
                    self.truncate(slot, 29)
            return super().decode(slots, tokens)

    result = check(Bundle.open(verified_bundle), backends={"forgetful": Forgetful})
    assert not result.passed
    assert result.first_departure is not None
    assert result.first_departure.backend == "forgetful"
    assert result.first_departure.step > 0
    assert result.first_departure.error > 1e-3


def test_another_token_is_a_failure_where_the_logits_agree(bundle_copy: Path) -> None:
    def swap(tokens: Any) -> Any:
        tokens[0, :2] = tokens[0, 1::-1]
        return tokens

    bundle = rewrite_reference(bundle_copy, top_tokens=swap)
    assert not check(bundle, backends=ONE_BACKEND).passed


def test_token_that_rounding_decides_is_counted_as_a_tie(bundle_copy: Path) -> None:
    row = ReferenceData.read(Bundle.open(bundle_copy)).rows[0]
    best, second = row.top_tokens[0, :2]

    class Rounding(OnnxRuntimeRunner):
        """Gives the first position's two best tokens the same logit, one rounding apart."""

        def prefill(self, *args: Any) -> Any:
            logits = [rows.copy() for rows in super().prefill(*args)]
            value = np.float32(row.top_logits[0, 0])
            logits[0][-1, best], logits[0][-1, second] = value, np.nextafter(value, np.float32(99))
            return logits

    def equal(logits: Any) -> Any:
        logits[0, 1] = logits[0, 0]
        return logits

    bundle = rewrite_reference(bundle_copy, top_logits=equal)
    result = check(bundle, backends={"rounding": Rounding})
    assert result.passed, result.first_departure
    assert result.replays[0].ties == 1


def test_bundle_that_was_not_verified_is_refused(golden_bundle: Callable[[str], Path]) -> None:
    with pytest.raises(BundleError, match=r"has no reference\.npz .*built with --no-verify"):
        check(Bundle.open(golden_bundle("qwen2_untied")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_lengths": lambda a: a + 1}, "row lengths add up to"),
        ({"prompt_lengths": lambda a: -a}, "row lengths add up to"),
        ({"top_tokens": lambda a: a + 1000}, "token outside the vocabulary"),
        ({"scales": lambda a: a[:, None]}, "scales is float32 with 2 axes"),
        ({"names": lambda a: a[:-1]}, "names, prompt_lengths and step_counts have"),
        ({"top_logits": lambda a: a[:, :4]}, "differ in shape"),
    ],
)
def test_damaged_reference_is_named(
    bundle_copy: Path, changes: dict[str, Callable[[Any], Any]], message: str
) -> None:
    bundle = rewrite_reference(bundle_copy, **changes)
    with pytest.raises(BundleError, match=rf"reference\.npz is damaged: .*{message}"):
        check(bundle)


def test_reference_that_is_no_archive_is_named(bundle_copy: Path) -> None:
    (bundle_copy / REFERENCE_FILE).write_bytes(b"nonsense")
    bundle = relist(bundle_copy, bundle_copy / REFERENCE_FILE)
    with pytest.raises(BundleError, match=r"reference\.npz is damaged"):
        check(bundle)


def test_format_without_a_tolerance_is_refused(verified_bundle: Path) -> None:
    bundle = Bundle.open(verified_bundle)
    other = Bundle(bundle.path, replace(bundle.manifest, compute_dtype="fp8"))
    with pytest.raises(BundleError, match=r"compute_dtype must be one of fp32 .*got fp8"):
        check(other)


def test_no_engine_to_check_on_is_refused(verified_bundle: Path) -> None:
    with pytest.raises(ValueError, match="backends must name at least one engine"):
        check(Bundle.open(verified_bundle), backends={})


def test_progress_counts_bytes_and_calls_to_the_end(verified_bundle: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def record(label: str, done: int, total: int) -> None:
        assert done > seen.get(label, (0, 0))[0]
        seen[label] = (done, total)

    check(Bundle.open(verified_bundle), backends=ONE_BACKEND, progress=record)
    assert list(seen) == ["Checking files", "Replaying on cpu"]
    assert all(done == total for done, total in seen.values())


def test_check_needs_no_torch_transformers_or_onnx(verified_bundle: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'qwen_export'): sys.modules[name] = None\n"
        "from qwen_runtime.bundle import Bundle\n"
        "from qwen_runtime.check import check\n"
        "print(check(Bundle.open(sys.argv[1])).passed)\n"
    )
    command = [sys.executable, "-c", code, str(verified_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("departs", [True, False])
def test_packed_weights_are_suspected_where_only_serving_departs(departs: bool) -> None:
    departure = CheckDeparture(SERVED_BACKEND, "hello", 3, 0.9, 1, 2)
    sound = ReplayResult("ONNX Runtime", 8, 1e-6, 1e-7, 1e-4, 0, None)
    served = ReplayResult(SERVED_BACKEND, 8, 0.9, 0.5, 0.1, 0, departure if departs else None)
    result = CheckResult(5, 1e-4, 2, (sound,), served, 0.05, "/cache/packed")
    problem = result.problem or ""
    assert problem.startswith(SERVED_BACKEND)
    assert "delete /cache/packed, which is made again" in problem
    bare = replace(result, packed_weights=None)
    assert "delete" not in (bare.problem or "")
    own = replace(departure, backend="ONNX Runtime")
    both = replace(result, replays=(replace(sound, first_departure=own),))
    assert both.problem == str(own)
