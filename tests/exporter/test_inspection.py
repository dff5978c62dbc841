"""What a bundle's manifest and `inspect` say of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from exporter.quantized_layouts import gptq
from exporter.quantized_layouts import write_checkpoint as write_packed
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.cli.main import parity_line
from qwen_export.inspection import COLUMNS, describe_text
from qwen_runtime.bundle import Bundle
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


def test_what_inspect_shows_fits_a_terminal(imported: Bundle) -> None:
    verified = Bundle(imported.path, replace(imported.manifest, parity=PARITY))
    lines = describe_text(verified).splitlines()[1:]  # the first is the folder
    assert [line for line in lines if len(line) > COLUMNS] == []
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
