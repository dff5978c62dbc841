"""The manifest: its schema holds on the way out and on the way in."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qwen_runtime import Bundle, BundleError
from qwen_runtime.manifest import (
    FileEntry,
    GraphEntry,
    Manifest,
    ModelEntry,
    ParitySummary,
    QualitySummary,
    QuantizationEntry,
    QuantizedGroup,
    TensorEntry,
    TokenizerEntry,
    WeightsEntry,
)

SCHEMA = json.loads(resources.files("qwen_runtime").joinpath("manifest.schema.json").read_text())


@pytest.fixture(scope="module")
def manifest(text_bundle: Path) -> Manifest:
    return Bundle.open(text_bundle).manifest


def test_schema_is_a_valid_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_written_manifest_is_read_back_unchanged(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest.to_json(), "utf-8")

    assert Manifest.read(tmp_path) == manifest


def test_bundle_without_tokenizer_is_read_back_unchanged(
    manifest: Manifest, tmp_path: Path
) -> None:
    plain = replace(manifest, tokenizer=None, revision="main")
    (tmp_path / "manifest.json").write_text(plain.to_json(), "utf-8")

    assert Manifest.read(tmp_path) == plain


def test_quantised_bundle_is_read_back_unchanged(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(quantized(manifest).to_json(), "utf-8")

    assert Manifest.read(tmp_path) == quantized(manifest)


def quantized(manifest: Manifest) -> Manifest:
    groups = (
        QuantizedGroup("linear", "int4", 32, "gptq", 14, 1000),
        QuantizedGroup("float", "fp32", None, None, 5, 200),
    )
    quality = QualitySummary(10, 0.1, 0.5, 0.9, 0.2, 0.01, 0.005)
    return replace(
        manifest,
        precision="int4",
        quantization=QuantizationEntry(4, 32, "gptq", "0" * 64, groups),
        parity=ParitySummary("passed", 1e-6, 1e-4, 10, 0, quality),
    )


def test_checkpoints_own_codes_have_no_format_of_ours(manifest: Manifest, tmp_path: Path) -> None:
    groups = (QuantizedGroup("linear", "int4", 32, "imported", 14, 1000),)
    entry = QuantizationEntry(None, None, None, None, groups)
    imported = replace(quantized(manifest), quantization=entry)
    (tmp_path / "manifest.json").write_text(imported.to_json(), "utf-8")

    assert Manifest.read(tmp_path) == imported


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_does_not_have_are_not_written(manifest: Manifest, bad: float) -> None:
    broken = replace(manifest, parity=ParitySummary("failed", bad, 1e-4, 10, 0))
    with pytest.raises(BundleError, match="every number must be finite"):
        broken.to_json()


def test_numbers_that_json_does_not_have_are_not_read(manifest: Manifest, tmp_path: Path) -> None:
    text = replace(manifest, parity=ParitySummary("failed", 12345.0, 1e-4, 10, 0)).to_json()
    (tmp_path / "manifest.json").write_text(text.replace("12345.0", "NaN"), "utf-8")
    with pytest.raises(BundleError, match="NaN is no number in JSON"):
        Manifest.read(tmp_path)


def test_manifest_of_the_first_version_is_still_read(manifest: Manifest, tmp_path: Path) -> None:
    raw = json.loads(manifest.to_json()) | {"schema_version": 1}
    del raw["quantization"], raw["parity"]["quality"]
    (tmp_path / "manifest.json").write_text(json.dumps(raw), "utf-8")

    assert Manifest.read(tmp_path) == replace(manifest, schema_version=1)


@pytest.mark.parametrize(("precision", "with_entry"), [("fp32", True), ("int8", False)])
def test_precision_and_quantization_must_agree(
    manifest: Manifest, precision: str, with_entry: bool
) -> None:
    entry = quantized(manifest).quantization if with_entry else None
    needs = "no entry" if with_entry else "an entry"
    with pytest.raises(BundleError, match=f"quantization: precision {precision} needs {needs}"):
        replace(manifest, precision=precision, quantization=entry).to_json()


def _objects(schema: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    if "properties" in schema:
        found.append(schema)
    for value in schema.values():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                found += _objects(child)
    return found


def test_schema_describes_every_field_and_allows_no_other() -> None:
    described = {frozenset(entry["properties"]) for entry in _objects(SCHEMA)}
    classes = (
        FileEntry,
        GraphEntry,
        Manifest,
        ModelEntry,
        ParitySummary,
        QualitySummary,
        QuantizationEntry,
        QuantizedGroup,
        TensorEntry,
        TokenizerEntry,
        WeightsEntry,
    )

    for kind in classes:
        fields = {field.name for field in dataclasses.fields(kind)}
        assert any(fields <= properties for properties in described), kind
    assert all(entry.get("additionalProperties") is False for entry in _objects(SCHEMA))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"max_context": 0}, "max_context"),
        ({"max_context": True}, "max_context"),
        ({"precision": "fp12"}, "precision"),
        ({"compute_dtype": "int4"}, "compute_dtype"),
        ({"files": {}}, "files"),
        ({"files": {"a": FileEntry("xyz", 1)}}, r"files\.a\.sha256"),
        ({"files": {"a": FileEntry("0" * 64, -1)}}, r"files\.a\.num_bytes"),
        ({"files": {"../a": FileEntry("0" * 64, 1)}}, "files"),
        ({"parity": ParitySummary("maybe")}, r"parity\.status"),  # type: ignore[arg-type]
        ({"graphs": {}}, "graphs"),
    ],
)
def test_manifest_that_breaks_the_schema_is_not_written(
    manifest: Manifest, changes: dict[str, Any], where: str
) -> None:
    with pytest.raises(
        BundleError, match=rf"manifest\.json: {where}: .*; the manifest is damaged"
    ):
        replace(manifest, **changes).to_json()


@pytest.mark.parametrize("dimension", [f.name for f in dataclasses.fields(ModelEntry)])
def test_every_dimension_is_required_on_reading(
    manifest: Manifest, tmp_path: Path, dimension: str
) -> None:
    raw = json.loads(manifest.to_json())
    del raw["model"][dimension]
    (tmp_path / "manifest.json").write_text(json.dumps(raw), "utf-8")

    with pytest.raises(BundleError, match=rf"model: '{dimension}' is a required property"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("document", ["[]", "null", "3", '"text"', "{}"])
def test_document_that_is_no_manifest_is_refused(tmp_path: Path, document: str) -> None:
    (tmp_path / "manifest.json").write_text(document, "utf-8")

    with pytest.raises(BundleError, match=r"manifest\.json: .*the manifest is damaged"):
        Manifest.read(tmp_path)


def test_unknown_field_is_refused_by_name(manifest: Manifest, tmp_path: Path) -> None:
    raw = json.loads(manifest.to_json()) | {"extra": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(raw), "utf-8")

    with pytest.raises(BundleError, match="'extra' was unexpected"):
        Manifest.read(tmp_path)
