"""The lowest rung: a weights file that is not the checkpoint's does not pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporter.quantized_layouts import gptq
from exporter.quantized_layouts import write_checkpoint as write_packed
from safetensors.numpy import load_file, save_file
from small_checkpoints import small_checkpoint

from qwen_export.bundle import BuildOptions, build
from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.errors import ParityError
from qwen_export.parity import verify
from qwen_export.parity.original import BundleWeights
from qwen_export.parity.stored import compare_stored
from qwen_runtime.bundle import Bundle

Tensors = dict[str, np.ndarray[Any, Any]]
Change = Callable[[Tensors], None]

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
GATE, UP = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers, a tied table and an odd vocabulary."""
    return small_checkpoint(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def built(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Bundles of it, by precision."""
    root = tmp_path_factory.mktemp("built")
    return {
        precision: build(
            folder, root / precision, BuildOptions(precision, verify=False, block_size=block)
        )
        for precision, block in (("fp32", None), ("int8", 32), ("int4", 32))
    }


def changed(folder: Path, target: Path, change: Change) -> Checkpoint:
    """A copy of a checkpoint with other weights."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return open_checkpoint(target)


def zero_down(tensors: Tensors) -> None:
    tensors[DOWN][:] = 0


def scale_norm(tensors: Tensors) -> None:
    tensors[NORM] *= np.float32(1.25)


def zero_bias(tensors: Tensors) -> None:
    tensors[BIAS][:] = 0


def swap(tensors: Tensors) -> None:
    tensors[GATE], tensors[UP] = tensors[UP], tensors[GATE]


def zero_row(tensors: Tensors) -> None:
    tensors[UP][17] = 0


def scale_up(tensors: Tensors) -> None:
    tensors[UP] *= np.float32(1.25)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_checkpoints_own_weights_pass(
    built: dict[str, Bundle], folder: Path, precision: str
) -> None:
    stored = compare_stored(built[precision], open_checkpoint(folder))
    assert stored.problem is None
    assert stored.departed == ()
    if precision == "fp32":
        assert stored.exact == stored.tensors == 26
        assert (stored.max_error, stored.max_share) == (0, 0)
    else:
        # A quantised tied table is two names for one tensor; norms and biases stay floats.
        assert (stored.tensors, stored.exact) == (27, 11)
        assert 0.2 < stored.max_share < 1
        low, high = (1e-6, 1e-3) if precision == "int8" else (1e-3, 0.05)
        assert low < stored.max_error < high


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(
    ("change", "first", "count"),
    [
        (zero_down, DOWN, 1),
        (scale_norm, NORM, 1),
        (zero_bias, BIAS, 1),
        (swap, GATE, 2),
        (zero_row, UP, 1),
        (scale_up, UP, 1),
    ],
)
def test_another_weight_is_named(
    built: dict[str, Bundle],
    folder: Path,
    tmp_path: Path,
    precision: str,
    change: Change,
    first: str,
    count: int,
) -> None:
    other = changed(folder, tmp_path / "other", change)
    stored = compare_stored(built[precision], other)
    assert stored.departed[0] == first
    assert len(stored.departed) == count
    assert f"stored weights: {first}" in (stored.problem or "")


def test_the_output_that_departs_is_named(
    built: dict[str, Bundle], folder: Path, tmp_path: Path
) -> None:
    other = changed(folder, tmp_path / "other", zero_row)
    problem = compare_stored(built["int4"], other).problem or ""
    assert f"{UP}, output 17 of 96: its codes have" in problem
    assert "(of weights that are 0)" in problem
    problem = compare_stored(built["fp32"], other).problem or ""
    assert f"{UP} must hold the checkpoint's own numbers, but [17, 0] is" in problem


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_another_checkpoint_of_the_same_shape_departs_everywhere(
    built: dict[str, Bundle], tmp_path: Path, precision: str
) -> None:
    other = open_checkpoint(small_checkpoint(tmp_path / "other", seed=1))
    stored = compare_stored(built[precision], other)
    assert len(stored.departed) == stored.tensors


def test_a_checkpoint_whose_tables_are_two_is_refused(
    built: dict[str, Bundle], tmp_path: Path
) -> None:
    other = open_checkpoint(small_checkpoint(tmp_path / "other", tie_word_embeddings=False))
    with pytest.raises(ParityError, match="has two tables for embedding and output projection"):
        verify(built["int4"], other)


def test_a_bundle_without_a_tensor_of_the_config_is_refused(
    built: dict[str, Bundle], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BundleWeights, "__contains__", lambda self, name: name != NORM)
    with pytest.raises(ParityError, match=f"has no {NORM}"):
        compare_stored(built["fp32"], open_checkpoint(folder))


def test_verify_fails_by_a_weight_that_answers_hardly_show(
    built: dict[str, Bundle], folder: Path, tmp_path: Path
) -> None:
    def scale_slightly(tensors: Tensors) -> None:
        tensors[NORM] *= np.float32(1.01)

    report = verify(built["int8"], changed(folder, tmp_path / "other", scale_slightly))
    assert report.quality is not None
    assert report.quality.problem is None
    assert not report.departures
    assert not report.passed
    assert report.summary().status == "failed"
    assert report.first_departure == report.stored.problem
    assert json.loads(report.to_json())["stored"]["departed"] == [NORM]


# --- codes that a checkpoint brings --------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in GPTQ's layout, int4."""
    target = tmp_path_factory.mktemp("packed") / "model"
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    write_packed(target, gptq(4, 32), config, model=str(folder))
    return target


@pytest.fixture(scope="module")
def imported(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("imported") / "out"
    return build(packed, target, BuildOptions(verify=False))


def test_imported_codes_are_the_checkpoints_bit_by_bit(packed: Path, imported: Bundle) -> None:
    stored = compare_stored(imported, open_checkpoint(packed))
    assert stored.problem is None
    # All but the table and its other name, which are quantised.
    assert stored.exact == stored.tensors - 2


def test_one_imported_code_that_differs_departs(
    packed: Path, imported: Bundle, tmp_path: Path
) -> None:
    def flip(tensors: Tensors) -> None:
        tensors[UP.removesuffix("weight") + "qweight"][2, 3] ^= 1 << 8

    other = changed(packed, tmp_path / "other", flip)
    stored = compare_stored(imported, other)
    assert stored.departed == (UP,)
    # The third code of the third word of eight.
    assert "but [3, 18] is" in (stored.problem or "")


def test_reading_part_of_packed_codes_gives_that_part(
    built: dict[str, Bundle], folder: Path
) -> None:
    weights = BundleWeights(built["int4"], open_checkpoint(folder))
    for name in (UP, DOWN):
        whole = weights.read(name)
        for which in (slice(0, 1), slice(3, 10), slice(5, None), np.array([7, 2, 2, 0])):
            np.testing.assert_array_equal(weights.rows(name, which), whole[which])
