"""`verify`: sound bundles pass, tampered ones fail and the first departure is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from qwen_export.checkpoint import Checkpoint
from qwen_export.errors import ParityError
from qwen_export.parity import ParityReport, ladder, verify
from qwen_export.parity.reference import Rope, StreamedReference
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle

Checkpoints = Callable[[str], Checkpoint]


def change_tensor(bundle: Path, name: str, change: Callable[[np.ndarray], None]) -> None:  # type: ignore[type-arg]
    """Change a tensor of weights.bin in place."""
    graph = onnx.load(bundle / "prefill.onnx", load_external_data=False).graph
    (tensor,) = [item for item in graph.initializer if item.name == name]
    entry = {item.key: item.value for item in tensor.external_data}
    memory = np.memmap(
        bundle / entry["location"], np.float32, "r+", int(entry["offset"]), tuple(tensor.dims)
    )
    change(memory)
    memory.flush()


def case(report: ParityReport, key: str) -> int:
    (found,) = [item for item in report.cases if item.key == key]
    return found.failures


def test_sound_bundle_passes_with_room(untied_report: ParityReport) -> None:
    assert untied_report.passed
    assert untied_report.first_departure is None
    assert untied_report.max_error < untied_report.tolerance / 10
    assert untied_report.tokens_compared > 500
    assert untied_report.ties == 0


def test_every_case_that_fits_the_context_is_compared(untied_report: ParityReport) -> None:
    missing = {item.key for item in untied_report.cases if not item.positions}
    # 64 tokens of context: no prompt is longer than 48, and a cache of 64 cannot grow.
    assert missing == {"prefill in chunks of 96", "greedy decode, growing"}


def test_same_tokens_run_two_ways_give_the_same_bits(untied_report: ParityReport) -> None:
    assert len(untied_report.invariants) == 2
    assert all(item.bit_equal for item in untied_report.invariants)


def test_every_tensor_of_floats_is_the_checkpoints(untied_report: ParityReport) -> None:
    stored = untied_report.stored
    # Embedding, output projection and last norm; of each of two layers seven linear layers, three
    # biases and two norms.
    assert stored.tensors == stored.exact == 3 + 2 * (7 + 3 + 2)
    assert (stored.max_share, stored.worst, stored.departed) == (0, None, ())


def test_every_negative_control_fails_by_far(untied_report: ParityReport) -> None:
    errors = {item.key: item.error for item in untied_report.controls}
    assert errors.keys() == {"wrong theta", "swapped halves", "past_lengths off by one"}
    assert all(error is not None and error > 0.1 for error in errors.values())
    assert all(item.detected and not item.blind for item in untied_report.controls)


def test_changed_weight_fails_from_the_first_rung_on(
    untied_copy: Path, golden_checkpoint: Checkpoints
) -> None:
    def change(weight: np.ndarray) -> None:  # type: ignore[type-arg]
        weight[3, 5] += 0.5

    change_tensor(untied_copy, "model.layers.1.mlp.up_proj.weight", change)
    report = verify(Bundle.open(untied_copy), golden_checkpoint("qwen2_untied"))
    assert not report.passed
    assert report.summary().status == "failed"
    assert report.stored.departed == ("model.layers.1.mlp.up_proj.weight",)
    assert report.first_departure == report.stored.problem
    assert "must hold the checkpoint's own numbers, but [5, 3] is" in (report.stored.problem or "")
    described = report.departures[0].describe(report.tolerance)
    assert described.startswith("prefill whole, prompt")
    assert "is above the tolerance 1e-4" in described


def test_changed_rope_table_departs_at_the_changed_position(
    untied_copy: Path, golden_checkpoint: Checkpoints
) -> None:
    def change(table: np.ndarray) -> None:  # type: ignore[type-arg]
        table[40:] *= -1

    # No prompt reaches position 40: only decode steps do.
    change_tensor(untied_copy, "model.rotary_emb.sin", change)
    report = verify(Bundle.open(untied_copy), golden_checkpoint("qwen2_untied"))
    assert not report.passed
    assert case(report, "prefill whole") == 0
    assert case(report, "greedy decode") > 0
    first = report.departures[0]
    assert first.case == "greedy on the prefill graph"
    assert first.position == 40
    assert f"position 40 (greedy step {first.step})" in (report.first_departure or "")


def test_wrong_theta_in_the_rope_tables_fails(
    untied_copy: Path, golden_checkpoint: Checkpoints
) -> None:
    angles = np.arange(64)[:, None] * 20000.0 ** (-np.arange(0, 8, 2) / 8)[None]

    def rewrite(function: np.ufunc) -> Callable[[np.ndarray], None]:  # type: ignore[type-arg]
        def change(table: np.ndarray) -> None:  # type: ignore[type-arg]
            table[:] = function(angles)

        return change

    change_tensor(untied_copy, "model.rotary_emb.cos", rewrite(np.cos))
    change_tensor(untied_copy, "model.rotary_emb.sin", rewrite(np.sin))
    report = verify(Bundle.open(untied_copy), golden_checkpoint("qwen2_untied"))
    assert not report.passed
    assert report.departures[0].position == 1  # at position 0 every angle is 0


def test_decode_graph_that_differs_from_prefill_is_named(
    untied_copy: Path, golden_checkpoint: Checkpoints
) -> None:
    model = onnx.load(untied_copy / "decode.onnx", load_external_data=False)
    (add,) = [node for node in model.graph.node if node.name == "/model/layers.0/mlp/Mul_1"]
    add.op_type = "Add"
    (untied_copy / "decode.onnx").write_bytes(model.SerializeToString())
    bundle = Bundle(untied_copy, Bundle.open(untied_copy, allow_failed=True).manifest)
    report = verify(bundle, golden_checkpoint("qwen2_untied"))
    assert not report.passed
    assert (report.first_departure or "").startswith("greedy decode, prompt")
    assert case(report, "greedy on the prefill graph") == 0


@pytest.mark.parametrize("blinded", ["wrong theta", "swapped halves"])
def test_check_that_cannot_see_a_wrong_rotation_fails(
    blinded: Rope,
    golden_bundle: Callable[[str], Path],
    golden_checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rotary = StreamedReference.rotary
    calls: list[Rope] = []

    def blind(self: StreamedReference, rope: Rope, length: int) -> object:
        # Wrong when asked whether the control applies, and exact when it runs.
        calls.append(rope)
        applies = calls.count(blinded) > 1 and rope == blinded
        return rotary(self, "exact" if applies else rope, length)

    monkeypatch.setattr(StreamedReference, "rotary", blind)
    bundle = Bundle.open(golden_bundle("qwen2_untied"))
    report = verify(bundle, golden_checkpoint("qwen2_untied"))
    assert not report.passed
    assert report.departures == ()
    assert f"the check is blind: with {blinded}" in (report.first_departure or "")


def test_check_that_cannot_see_a_shifted_past_fails(
    golden_bundle: Callable[[str], Path],
    golden_checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keep(self: OnnxRuntimeRunner, slot: int, length: int) -> None:
        """Ignore the shift."""

    monkeypatch.setattr(OnnxRuntimeRunner, "truncate", keep)
    bundle = Bundle.open(golden_bundle("qwen2_untied"))
    report = verify(bundle, golden_checkpoint("qwen2_untied"))
    assert not report.passed
    assert "the check is blind: with past_lengths off by one" in (report.first_departure or "")


@pytest.mark.slow
@pytest.mark.parametrize("max_context", [1, 2, 3])
def test_shortest_contexts_verify_what_they_have_room_for(
    max_context: int,
    build_bundle: Callable[..., Path],
    golden_checkpoint: Checkpoints,
) -> None:
    checkpoint = golden_checkpoint("qwen2_draft")
    bundle = build_bundle(checkpoint.path, max_context=max_context)
    report = verify(Bundle.open(bundle), checkpoint)
    assert report.passed, report.first_departure
    notes = [item.note for item in report.controls]
    if max_context == 1:
        assert "rotates by the same angles" in (notes[0] or "")
        assert "no room for a decode step" in (notes[2] or "")
    else:
        assert notes == [None, None, None]


def test_checkpoint_of_other_dimensions_is_refused(
    golden_bundle: Callable[[str], Path], golden_checkpoint: Checkpoints
) -> None:
    bundle = Bundle.open(golden_bundle("qwen2_untied"))
    with pytest.raises(ParityError, match=r"its hidden_size is 32 and .*qwen2_draft has 16"):
        verify(bundle, golden_checkpoint("qwen2_draft"))


def test_progress_names_every_long_step(
    golden_bundle: Callable[[str], Path], golden_checkpoint: Checkpoints
) -> None:
    from contextlib import contextmanager

    amounts: dict[str, tuple[int | None, int]] = {}

    @contextmanager
    def record(label: str, total: int | None = None, *, unit: str = ""):  # type: ignore[no-untyped-def]
        done: list[int] = []
        yield done.append
        amounts[label] = (total, sum(done))

    bundle = Bundle.open(golden_bundle("qwen2_untied"))
    verify(bundle, golden_checkpoint("qwen2_untied"), progress=record)
    assert list(amounts) == [
        "Comparing stored weights", "Running prefill", "Running decode", "Running the original",
        "Comparing",
    ]  # fmt: skip
    assert all(total == done for total, done in amounts.values())


def test_left_padded_rows_run_as_one_batch_in_the_reference(
    golden_bundle: Callable[[str], Path],
    golden_checkpoint: Checkpoints,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    run = StreamedReference.hidden_states

    def record(self: StreamedReference, batches: Sequence[ladder.ReferenceBatch], *args: object):  # type: ignore[no-untyped-def]
        sizes.extend(len(batch.rows) for batch in batches)
        return run(self, batches, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamedReference, "hidden_states", record)
    verify(Bundle.open(golden_bundle("qwen2_untied")), golden_checkpoint("qwen2_untied"))
    assert sorted(sizes) == [1, 1, 1, 1, 1, 1, 3]
