"""The highest logits of a step: found on the device, brought, proved, and followed by all others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from cuda_double import HostSeam
from tensorrt_engines import linked_bundle

from qwen_export.lowering import LoweringOptions, lower_bundle
from qwen_runtime import LLM, BackendError, BundleError
from qwen_runtime.backends.cuda import CudaRunner, opening
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE
from qwen_runtime.bundle import Bundle
from qwen_runtime.lowered_description import LOWERED_FILE
from qwen_runtime.lowered_file import LoweredFolder

VOCAB, COUNT = 128, 16


def lowered(source: Path, target: Path) -> Bundle:
    bundle = linked_bundle(source, target)
    lower_bundle(bundle, "cuda", LoweringOptions("fp32", "group_query", num_top=COUNT))
    return bundle


@pytest.fixture
def runner(
    verified_bundle: Path, tmp_path: Path
) -> Iterator[Callable[..., tuple[CudaRunner, HostSeam]]]:
    bundle = lowered(verified_bundle, tmp_path / "bundle")
    opened: list[tuple[CudaRunner, HostSeam]] = []

    def get(seam: HostSeam | None = None) -> tuple[CudaRunner, HostSeam]:
        seam = seam or HostSeam()
        made = CudaRunner(bundle, LoweredFolder.open(bundle, "cuda"), seam)
        opened.append((made, seam))
        return opened[-1]

    yield get
    for made, seam in opened:
        made.close()
        assert seam.leaks() == {}


def started(made: CudaRunner, count: int) -> None:
    made.allocate(count, 1)
    rng = np.random.default_rng(2)
    tokens = [rng.integers(0, VOCAB, 3 + slot % 5) for slot in range(count)]
    made.prefill(range(count), tokens, [0] * count, [1] * count)


def test_every_slot_gets_its_own_highest_whichever_block_it_is_in(
    runner: Callable[..., tuple[CudaRunner, HostSeam]],
) -> None:
    (made, seam), (plain, _) = runner(), runner()
    slots = [37, 0, 5, 33, 12]
    for each in (made, plain):
        started(each, 40)
    expected = plain.decode(slots, [7, 8, 9, 10, 11]).copy()

    found = made.decode_top(slots, [7, 8, 9, 10, 11])

    assert found.best.tolist() == expected.argmax(-1).tolist()
    np.testing.assert_array_equal(np.take_along_axis(expected, found.tokens, -1), found.logits)
    np.testing.assert_array_equal(found.logits, -np.sort(-expected)[:, :COUNT])
    lengths = seam.ran[-2:]
    # Of two blocks the device holds the second's; the first runs once more, and no token is added.
    np.testing.assert_array_equal(made.whole_logits([33, 0, 12]), expected[[3, 1, 4]])
    assert seam.ran[-1] == lengths[0] != lengths[1]
    assert made.num_whole_rows == 3
    again = [each.decode(slots, [1] * 5).copy() for each in (made, plain)]
    np.testing.assert_array_equal(*again)


def test_results_that_lie_alone_survive_when_buffers_move(
    runner: Callable[..., tuple[CudaRunner, HostSeam]],
) -> None:
    made, _ = runner()
    started(made, 2)
    for slots in (2, 20, 2):
        made.allocate(slots, 1)
        whole = made.decode([1], [6])[0].copy()
        made.truncate(1, 4)
        found = made.decode_top([1], [6])
        made.truncate(1, 4)
        np.testing.assert_array_equal(found.logits[0], whole[found.tokens[0]])


class Edited(HostSeam):
    """Changes what a search has found, or what a step has computed, before it is brought."""

    def __init__(self, name: str, change: Callable[[Any], object]) -> None:
        super().__init__()
        self._name, self._change = name, change

    def run(self, session: Any, binding: Any, stream: int, graph: int) -> None:
        super().run(session, binding, stream, graph)
        if self._name in binding.places:
            _, address, size = binding.places[self._name]
            content = self._slice(address, size).view(
                np.int64 if "tokens" in self._name else np.float32
            )
            self._change(content.reshape(binding.shapes[self._name]))


def test_a_nan_is_refused(runner: Callable[..., tuple[CudaRunner, HostSeam]]) -> None:
    made, _ = runner(Edited("next_tokens", lambda tokens: tokens.fill(VOCAB)))
    started(made, 2)

    with pytest.raises(BackendError, match=r"logits must be numbers, got a NaN; check the wei"):
        made.decode_top([0], [5])


def move_down(tokens: Any) -> None:
    tokens[...] = (tokens + 1) % VOCAB


def lose_the_best(logits: Any) -> None:
    logits[:, 0] -= 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("top_tokens", move_down),
        ("top_tokens", lambda tokens: tokens.fill(3)),
        ("top_tokens", lambda tokens: tokens.fill(2**31 - 1)),
        ("top_logits", lose_the_best),
    ],
)
def test_a_device_that_brings_others_than_the_highest_is_not_proved(
    name: str,
    change: Callable[[Any], object],
    verified_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    bundle, seam = lowered(verified_bundle, tmp_path / "bundle"), Edited(name, change)
    monkeypatch.setattr(opening, "load_seam", lambda: seam)

    with pytest.raises(
        BackendError, match=r"must find the highest logits on Host, .*make them ag"
    ):
        LLM(bundle.path, device="cuda")

    assert seam.leaks() == {}


def test_the_highest_that_leave_out_a_higher_one_are_not_proved(
    verified_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(HostSeam):
        """Brings the second highest logit in the place of the highest."""

        def run(self, session: Any, binding: Any, stream: int, graph: int) -> None:
            super().run(session, binding, stream, graph)
            if "top_logits" in binding.places:
                for name, kind in (("top_logits", np.float32), ("top_tokens", np.int64)):
                    _, address, size = binding.places[name]
                    rows = self._slice(address, size).view(kind).reshape(binding.shapes[name])
                    _, source, size = binding.places["logits"]
                    logits = self._slice(source, size).view(np.float32).reshape(len(rows), -1)
                    order = np.argsort(-logits)[:, 1 : 1 + rows.shape[1]]
                    rows[...] = order if kind is np.int64 else np.take_along_axis(logits, order, 1)

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    bundle = lowered(verified_bundle, tmp_path / "bundle")
    monkeypatch.setattr(opening, "load_seam", Second)

    with pytest.raises(BackendError, match=r"must find the highest logits on Host"):
        LLM(bundle.path, device="cuda")


@pytest.mark.parametrize("shape", [["batch", 0], ["batch", 129], ["batch", "many"]])
def test_a_graph_of_another_shape_is_refused(
    shape: list[Any], verified_bundle: Path, tmp_path: Path
) -> None:
    bundle = lowered(verified_bundle, tmp_path / "bundle")
    path = bundle.path / "lowered" / "cuda" / LOWERED_FILE
    raw = json.loads(path.read_text())
    for output in raw["graphs"]["top_logits"]["outputs"]:
        output["shape"] = shape
    path.write_text(json.dumps(raw))
    seam = HostSeam()

    with pytest.raises(BundleError, match=r"(outputs of .*batch|0 is less than the minimum)"):
        CudaRunner(bundle, LoweredFolder.open(bundle, "cuda"), seam)
    assert seam.leaks() == {}


# --- the graph ----------------------------------------------------------------------------------


def test_the_graph_brings_equal_logits_in_the_order_of_their_tokens(
    verified_bundle: Path, tmp_path: Path
) -> None:
    bundle = lowered(verified_bundle, tmp_path / "bundle")
    folder = LoweredFolder.open(bundle, "cuda")
    session = onnxruntime.InferenceSession(
        str(folder.graph_file("top_logits")), providers=["CPUExecutionProvider"]
    )
    rows = np.zeros((2, VOCAB), np.float32)
    rows[1, [100, 40]] = 1

    values, tokens = session.run(None, {"logits": rows})

    assert tokens[0].tolist() == list(range(COUNT))
    assert tokens[1].tolist() == [40, 100, *range(14)]
    assert values[1].tolist() == [1, 1, *[0] * 14]
