"""Opening a bundle: what is checked, and what each kind of damage says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_runtime import LLM, Bundle, BundleError
from qwen_runtime.bundle import sha256_of

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def bundle(text_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(text_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Edit) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), "utf-8")


def test_sound_bundle_opens_and_its_hashes_hold(bundle: Path) -> None:
    seen: list[int] = []
    opened = Bundle.open(bundle)

    opened.check_hashes(seen.append)

    assert sum(seen) == sum(entry.num_bytes for entry in opened.manifest.files.values())
    assert opened.file("weights.bin") == bundle / "weights.bin"
    assert {path.name for path in bundle.iterdir()} - {"manifest.json"} == set(
        opened.manifest.files
    )


def test_bundle_on_a_read_only_folder_loads(bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.iterdir()}
    for path in [*bundle.iterdir(), bundle]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        with LLM(bundle) as llm:
            assert llm.generate("a", max_new_tokens=2).token_ids
    finally:
        bundle.chmod(0o700)
    assert {path: path.stat().st_mtime_ns for path in bundle.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["weights.bin", "prefill.onnx", "tokenizer.json", "generation_config.json"]
)
def test_changed_byte_is_found_by_its_hash(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)

    opened = Bundle.open(bundle)

    with pytest.raises(
        BundleError, match=rf"{name}: sha256 must be .*changed or damaged"
    ) as error:
        opened.check_hashes()
    assert error.value.path == bundle / name


@pytest.mark.parametrize("name", ["weights.bin", "decode.onnx", "chat_template.jinja"])
def test_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()

    with pytest.raises(BundleError, match=rf"{name} is missing; copy the bundle again") as error:
        Bundle.open(bundle)
    assert error.value.path == bundle / name


def test_folder_in_place_of_a_file_is_a_missing_file(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").mkdir()

    with pytest.raises(BundleError, match=r"weights\.bin is missing"):
        Bundle.open(bundle)


def test_cut_off_file_is_named_with_both_sizes(bundle: Path) -> None:
    weights = bundle / "weights.bin"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(size - 1)

    with pytest.raises(BundleError, match=rf"size must be {size} bytes, got {size - 1}"):
        Bundle.open(bundle)


def test_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"must be a bundle, but has no manifest\.json; build"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_path_that_is_no_folder_is_no_bundle(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")

    with pytest.raises(BundleError, match="must be a bundle's folder, but is none") as error:
        LLM(tmp_path / place)
    assert error.value.path == tmp_path / place


@pytest.mark.parametrize("content", ["{", "", '{"schema_version": 1', "\x80"])
def test_manifest_that_is_no_json_is_refused(bundle: Path, content: str) -> None:
    (bundle / "manifest.json").write_bytes(content.encode("latin-1"))

    with pytest.raises(BundleError, match=r"manifest\.json must be readable JSON"):
        Bundle.open(bundle)


def test_newer_schema_is_refused_with_both_versions(bundle: Path) -> None:
    # A newer manifest may look different everywhere else too.
    edit(bundle, lambda manifest: manifest.update(schema_version=3, something_new=True))

    with pytest.raises(BundleError, match="schema_version must be at most 2, got 3; install"):
        Bundle.open(bundle)


@pytest.mark.parametrize("version", [0, True, "1", 1.5, None])
def test_schema_version_that_never_was_is_refused(bundle: Path, version: object) -> None:
    edit(bundle, lambda manifest: manifest.update(schema_version=version))

    with pytest.raises(BundleError, match=r"schema_version: .*the manifest is damaged"):
        Bundle.open(bundle)


def test_failed_parity_is_refused_unless_asked_for(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["parity"].update(status="failed"))

    with pytest.raises(BundleError, match="parity failed when it was built"):
        LLM(bundle)
    assert Bundle.open(bundle, allow_failed=True).manifest.parity.status == "failed"


@pytest.mark.parametrize(
    "name",
    ["../outside", "/etc/hostname", "a/../../outside", "..", "folder\\outside", "a\0b", ""],
)
def test_path_that_leaves_the_bundle_is_refused_wherever_it_stands(
    bundle: Path, name: str
) -> None:
    outside = bundle.parent / "outside"
    outside.write_bytes(b"x")
    entry = {"sha256": sha256_of(outside), "num_bytes": 1}
    changes: list[tuple[str, Edit]] = [
        ("files", lambda manifest: manifest["files"].update({name: entry})),
        ("weights.file", lambda manifest: manifest["weights"].update(file=name)),
        ("graphs.prefill.file", lambda manifest: manifest["graphs"]["prefill"].update(file=name)),
        (
            "tokenizer",
            lambda manifest: manifest["tokenizer"].update(chat_templates={"default": name}),
        ),
    ]
    whole = (bundle / "manifest.json").read_text("utf-8")

    for where, change in changes:
        (bundle / "manifest.json").write_text(whole, "utf-8")
        edit(bundle, change)
        with pytest.raises(BundleError, match=rf"manifest\.json: {where}.*manifest is damaged"):
            Bundle.open(bundle)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_link_that_leaves_the_bundle_is_refused(bundle: Path, kind: str) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    shutil.move(bundle / "weights.bin", outside / "weights.bin")
    if kind == "file":
        (bundle / "weights.bin").symlink_to(outside / "weights.bin")
    else:
        (bundle / "link").symlink_to(outside)

        def move(manifest: dict[str, Any]) -> None:
            manifest["files"]["link/weights.bin"] = manifest["files"].pop("weights.bin")
            manifest["weights"]["file"] = "link/weights.bin"

        edit(bundle, move)

    with pytest.raises(BundleError, match=r"weights\.bin leaves the bundle"):
        Bundle.open(bundle)


def test_bundle_may_itself_be_reached_through_a_link(bundle: Path) -> None:
    link = bundle.parent / "link"
    link.symlink_to(bundle)

    Bundle.open(link).check_hashes()


@pytest.mark.parametrize(
    "name", ["weights.bin", "prefill.onnx", "tokenizer.json", "chat_template.jinja"]
)
def test_file_in_use_must_be_listed_with_its_hash(bundle: Path, name: str) -> None:
    edit(bundle, lambda manifest: manifest["files"].pop(name))

    with pytest.raises(BundleError, match=rf"{name} must be listed under files"):
        Bundle.open(bundle)


def test_generation_config_that_is_not_listed_is_not_read(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["files"].pop("generation_config.json"))

    with pytest.raises(BundleError, match=r"generation_config\.json must be listed under files"):
        LLM(bundle)
