"""The graph for the CPU is proved like the portable ones, and a wrong one is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.parity import open_place, verify
from qwen_export.parity.case_table import LOWERED_CASES, PORTABLE_CASES
from qwen_runtime.bundle import Bundle, sha256_of
from qwen_runtime.check import LOWERED_BACKEND, check
from qwen_runtime.errors import BundleError

Damage = Callable[[onnx.GraphProto, dict[str, Any]], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(small_checkpoint(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture(scope="module")
def built(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An int8 bundle, verified."""
    options = BuildOptions("int8", block_size=32)
    return build(model.path, tmp_path_factory.mktemp("int8") / "out", options)


@pytest.fixture
def copy(built: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(built.path, tmp_path / "bundle"))


def damage_graph(bundle: Bundle, damage: Damage) -> None:
    """Change graph and description, and list the graph's new hash, so that only answers differ."""
    folder = bundle.path / "lowered" / "cpu"
    path = folder / "prefill.onnx"
    graph = onnx.load(path, load_external_data=False)
    document = json.loads((folder / "lowered.json").read_text())
    damage(graph.graph, document)
    onnx.save(graph, path)
    entry = {"sha256": sha256_of(path), "num_bytes": path.stat().st_size}
    document["files"]["prefill.onnx"] = entry
    (folder / "lowered.json").write_text(json.dumps(document))


def attentions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def swap_gate_and_up(_: onnx.GraphProto, document: dict[str, Any]) -> None:
    entries = {entry["name"]: entry for entry in document["initializers"]}
    gate, up = (entries[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    gate["parts"], up["parts"] = up["parts"], gate["parts"]


def rotate_otherwise(graph: onnx.GraphProto, _: dict[str, Any]) -> None:
    for node in attentions(graph):
        set_attribute(node, "rotary_interleaved", 1)


def see_four_tokens(graph: onnx.GraphProto, _: dict[str, Any]) -> None:
    set_attribute(attentions(graph)[1], "local_window_size", 4)


def lose_a_token(graph: onnx.GraphProto, _: dict[str, Any]) -> None:
    """Rows with a past take it for one token shorter."""
    (name,) = {node.input[5] for node in attentions(graph)}
    at = next(i for i, node in enumerate(graph.node) if name in node.output) + 1
    graph.initializer.append(helper.make_tensor("one", onnx.TensorProto.INT64, [1], [1]))
    for node in (
        helper.make_node("Sub", [name, "lost"], ["shorter"]),
        helper.make_node("Cast", ["any"], ["lost"], to=onnx.TensorProto.INT32),
        helper.make_node("Min", ["past_lengths", "one"], ["any"]),
    ):
        graph.node.insert(at, node)
    for node in attentions(graph):
        node.input[5] = "shorter"


DAMAGES: dict[str, Damage] = {
    "swapped weights": swap_gate_and_up,
    "interleaved rotation": rotate_otherwise,
    "narrow window": see_four_tokens,
    "past off by one": lose_a_token,
}


def test_every_case_of_the_graph_is_compared_and_named(built: Bundle) -> None:
    report = json.loads((built.path / "parity.json").read_text())
    cases = {case["key"]: case for case in report["cases"]}
    assert tuple(cases) == (*PORTABLE_CASES, *LOWERED_CASES)
    for key in LOWERED_CASES:
        assert cases[key]["graph"] == "lowered/cpu/prefill"
        assert cases[key]["positions"] >= 8, key
        assert 0 < cases[key]["max_error"] < 1e-5, key
    # Both phases: as many steps as on the portable graph.
    steps = cases["greedy on the prefill graph"]["positions"]
    assert cases["for the CPU: greedy"]["positions"] == steps
    for name in ("lowered/cpu/lowered.json", "lowered/cpu/prefill.onnx"):
        assert report["hashes"][name] == sha256_of(built.path / name)
    assert "lowered/cpu/prefill.onnx" in (built.path / "parity.html").read_text()


def test_the_core_lists_no_file_of_the_graph(built: Bundle) -> None:
    assert not [name for name in built.manifest.files if name.startswith("lowered")]
    assert (built.path / "lowered" / "cpu" / "lowered.json").is_file()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_graph_fails_verification(name: str, model: Checkpoint, copy: Bundle) -> None:
    damage_graph(copy, DAMAGES[name])
    report = verify(copy, model)
    assert not report.passed
    assert report.departures
    assert {item.case for item in report.departures} <= set(LOWERED_CASES)
    assert "for the CPU: " in (report.first_departure or "")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_wrong_graph_fails_the_check(name: str, copy: Bundle) -> None:
    damage_graph(copy, DAMAGES[name])
    result = check(copy)
    assert not result.passed
    assert result.first_departure is not None
    assert result.first_departure.backend == LOWERED_BACKEND
    assert result.first_departure.error > 0.01


def test_a_bundle_copied_without_the_graph_is_checked_and_verified_as_it_is(
    model: Checkpoint, copy: Bundle
) -> None:
    whole = check(copy)
    shutil.rmtree(copy.path / "lowered")
    bare = check(copy)
    assert bare.passed
    assert len(bare.replays) == len(whole.replays) - 1
    assert bare.num_files == whole.num_files - 1 == len(copy.manifest.files)
    place = open_place(copy)
    assert (place.cases, place.documents) == (PORTABLE_CASES, ())
    report = verify(copy, model)
    assert report.passed
    assert not set(LOWERED_CASES) & {case.key for case in report.cases}


def test_changed_bytes_of_the_graph_are_refused_before_anything_runs(
    model: Checkpoint, copy: Bundle
) -> None:
    path = copy.path / "lowered" / "cpu" / "prefill.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = r"cpu/prefill\.onnx: sha256 must be .* --target cpu --overwrite"
    for door in (lambda: check(copy), lambda: verify(copy, model), lambda: open_place(copy)):
        with pytest.raises(BundleError, match=message):
            door()
