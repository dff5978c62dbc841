"""What a bundle's manifest and `inspect` say of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from exporter.quantized_layouts import gptq
from exporter.quantized_layouts import write_checkpoint as write_packed
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.cli.main import parity_line
from qwen_export.inspection import COLUMNS, describe_text, lowered_line, summary
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.lowered_file import LoweredFolder
from qwen_runtime.manifest import ParitySummary, QualitySummary

PARITY = ParitySummary(
    "passed", 3.4e-6, 1e-4, 123_456, 12, QualitySummary(4567, 0.073, 12.5, 0.921, 0.5, 0.2, 0.1)
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with the codes of an int4 checkpoint."""
    root = tmp_path_factory.mktemp("imported")
    plain = small_checkpoint(root / "plain")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    write_packed(root / "packed", gptq(4, 32), config, model=str(plain))
    return build(root / "packed", root / "out", BuildOptions(verify=False))


def test_a_bundle_of_imported_codes_names_no_method_of_ours(imported: Bundle) -> None:
    entry = imported.manifest.quantization
    assert entry is not None
    assert (entry.bits, entry.block_size, entry.method) == (None, None, None)
    (linear,) = [group for group in entry.groups if group.role == "linear"]
    assert (linear.format, linear.block_size, linear.method) == ("int4", 32, "imported")


def claim_verified(bundle: Bundle, *, passed: bool = True) -> Path:
    """A report that says what one says that a build writes of the graph for the CPU."""
    hashes = {
        file.relative_to(bundle.path).as_posix(): sha256_of(file)
        for file in (bundle.path / "lowered" / "cpu").iterdir()
    }
    report = bundle.path / "parity.json"
    report.write_text(json.dumps({"passed": passed, "hashes": hashes}))
    return report


def test_a_graph_for_the_cpu_is_verified_where_the_report_is_about_its_files(
    imported: Bundle, tmp_path: Path
) -> None:
    bundle = Bundle.open(shutil.copytree(imported.path, tmp_path / "bundle"))

    def verified() -> bool:
        lowered = summary(bundle)["lowered"]
        assert isinstance(lowered, dict)
        found = lowered["cpu"]["verified"]
        assert isinstance(found, bool)
        line = lowered_line(LoweredFolder.open(bundle, "cpu"))
        assert line.endswith("; verified" if found else "; not verified")
        return found

    assert not verified()
    claim_verified(bundle, passed=False)
    assert not verified()
    report = claim_verified(bundle)
    assert verified()
    for text in ("", "[]", '{"passed": true, "hashes": 1}'):
        report.write_text(text)
        assert not verified()
    claim_verified(bundle)
    description = bundle.path / "lowered" / "cpu" / "lowered.json"
    description.write_text(description.read_text().replace('"created": "20', '"created": "19'))
    assert not verified()


@pytest.mark.slow
def test_a_build_verifies_the_graph_for_the_cpu(tmp_path: Path) -> None:
    made = build(small_checkpoint(tmp_path / "model"), tmp_path / "out", BuildOptions("int8"))
    text = describe_text(made)
    shown = text[text.index("lowered: lowered/cpu") :]
    assert "GroupQueryAttention, over the bundle's weights; verified\n" in shown
    assert "runs          on the CPU" in shown


def test_a_damaged_graph_for_the_cpu_is_shown_with_what_to_do(
    imported: Bundle, tmp_path: Path
) -> None:
    bundle = Bundle.open(shutil.copytree(imported.path, tmp_path / "bundle"))
    (bundle.path / "lowered" / "cpu" / "prefill.onnx").write_bytes(b"short")
    text = describe_text(bundle)
    assert "unusable" in text
    assert "--target cpu --overwrite" in text


def test_what_inspect_shows_fits_a_terminal(imported: Bundle) -> None:
    verified = Bundle(imported.path, replace(imported.manifest, parity=PARITY))
    lines = describe_text(verified).splitlines()[1:]  # the first is the folder
    # A command with the folder in it stays whole, to be copied.
    wide = [line for line in lines if len(line) > COLUMNS and str(imported.path) not in line]
    assert wide == []
    text = "\n".join(lines)
    assert "92.1% of 4567 tokens as the original's,\n" in text
    operators = text[text.index(" nodes ") : text.index("  in  input_ids")]
    # Continued lines are the list's own, with nothing left out.
    listed = [item.strip() for item in operators.removeprefix(" nodes ").split(",")]
    assert sum(int(item.split()[1]) for item in listed) == int(
        text[: text.index(" nodes ")].split()[-1]
    )


def test_a_parity_verdict_fits_a_terminal() -> None:
    lines = parity_line(PARITY).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= COLUMNS
    assert parity_line(replace(PARITY, quality=None)).splitlines() == lines[:2]
