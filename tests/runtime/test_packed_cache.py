"""Packed weights in the user's cache: the same answers, whole entries only, and never in the way."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qwen_export.bundle import BuildOptions, build
from qwen_runtime.backends import packed_cache, packed_file, sessions
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.backends.packed_cache import CACHE_VARIABLE, PackedCache, user_cache
from qwen_runtime.backends.packed_file import ALIGNMENT, rewrite
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BackendError, BundleError, RequestError

PROMPT = np.arange(5, 25, dtype=np.int64)


@pytest.fixture(scope="module", params=["int8", "int4"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("quantized") / "bundle"
    return build(None, folder, BuildOptions(precision=request.param, verify=False))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of entries; small bundles are worth an entry here."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(sessions, "MIN_CACHED_BYTES", 1)
    return tmp_path / "cache" / "packed"


def entries(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.exists() else []


def answers(bundle: Bundle, **options: bool) -> np.ndarray:
    """Logits of a prompt's last tokens and of two steps."""
    runner = OnnxRuntimeRunner(bundle, threads=1, **options)
    runner.allocate(1, 32)
    logits = [*runner.prefill([0], [PROMPT], [0], [3])[0]]
    logits += [runner.decode([0], [token])[0].copy() for token in (7, 8)]
    runner.close()
    return np.stack(logits)


def test_first_load_and_later_ones_answer_like_packing_in_memory(
    bundle: Bundle, root: Path
) -> None:
    expected = answers(bundle, packed_cache=False)
    assert entries(root) == []

    first = answers(bundle)
    made = entries(root)
    later = answers(bundle)

    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(later, expected)
    assert len(made) == 1
    assert entries(root) == made
    assert sorted(path.name for path in made[0].iterdir()) == [
        "entry.json",
        "model.onnx",
        "weights.bin",
    ]


def test_buffers_that_are_not_moved_answer_wrongly(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # What the rewriting is for: as ONNX Runtime saves them, buffers follow each other directly.
    monkeypatch.setattr(packed_file, "ALIGNMENT", 1)
    expected = answers(bundle, packed_cache=False)

    with caplog.at_level(logging.DEBUG):
        found = answers(bundle)

    assert "answers differently" in caplog.text
    assert entries(root) == []
    np.testing.assert_array_equal(found, expected)


def test_every_tensor_and_buffer_starts_on_a_page(bundle: Bundle, root: Path) -> None:
    onnx = pytest.importorskip("onnx")
    answers(bundle)

    model = onnx.load(entries(root)[0] / "model.onnx", load_external_data=False)
    packed = []
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                assert int(entry.value) % ALIGNMENT == 0
            if entry.key.startswith("prepacked_"):
                packed += [int(part.split(";")[0]) for part in entry.value.split("|")[1:]]
    assert len(packed) > 20
    assert all(offset % ALIGNMENT == 0 for offset in packed)


def test_second_load_does_not_pack_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    answers(bundle)
    monkeypatch.setattr(sessions, "_save_packed", lambda *_: pytest.fail("packed again"))

    answers(bundle)

    assert len(entries(root)) == 1


def test_exact_runner_and_small_bundles_use_no_cache(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    exact = answers(bundle, exact=True)
    monkeypatch.setattr(sessions, "MIN_CACHED_BYTES", 1 << 40)
    served = answers(bundle)

    assert entries(root) == []
    # Activations rounded to int8 are close to exact ones, and not the same.
    difference = np.abs(served - exact).max() / np.abs(exact).max()
    assert 1e-5 < difference < 0.1


def test_exact_must_be_true_or_false(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="exact must be True or False, got 1") as error:
        OnnxRuntimeRunner(bundle, exact=1)  # type: ignore[arg-type]
    assert error.value.param == "exact"


def test_switched_off_cache_is_not_used(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    assert user_cache() is None
    answers(bundle)
    assert not (tmp_path / "xdg").exists()


def test_folder_comes_from_the_variable_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert user_cache() == tmp_path / "cache"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "qwen-export"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache() == tmp_path / "home" / ".cache" / "qwen-export"


def test_folder_that_cannot_be_made_is_no_obstacle(
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = answers(bundle, packed_cache=False)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))

    np.testing.assert_array_equal(answers(bundle), expected)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(
        "is packed in memory at every load: .*Not a directory.*; set QWEN_EXPORT_CACHE",
        record.getMessage(),
    )


def test_home_folder_of_nobody_is_one_sentence(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "~no-such-user/cache")
    with pytest.raises(
        RequestError, match="QWEN_EXPORT_CACHE must name a folder or be off, got ~no"
    ):
        OnnxRuntimeRunner(bundle)


@pytest.mark.parametrize("file", ["weights.bin", "prefill.onnx", "lowered/cpu/prefill.onnx"])
def test_damaged_bundle_is_refused_before_it_is_packed_under_its_hash(
    bundle: Bundle, root: Path, tmp_path: Path, file: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle.path, damaged)
    content = bytearray((damaged / file).read_bytes())
    content[len(content) // 2] ^= 255
    (damaged / file).write_bytes(content)

    with pytest.raises(
        BundleError, match=f"{file}: sha256 must be .* copy (the bundle|them) again"
    ):
        answers(Bundle.open(damaged), lowered=file != "prefill.onnx")

    assert entries(root) == []
    np.testing.assert_array_equal(answers(bundle), answers(bundle, packed_cache=False))


def test_disk_holds_the_packed_form_twice_and_no_third_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    copy = packed_file._Tensors._copy

    def watch(tensors: packed_file._Tensors, offset: int, length: int) -> int:
        seen.update(path.name for path in Path(tensors._file.name).parent.iterdir())
        return copy(tensors, offset, length)

    monkeypatch.setattr(packed_file._Tensors, "_copy", watch)
    answers(bundle)

    assert seen == {"model.onnx", "saved.bin", "weights.bin"}


def test_full_disk_is_no_obstacle_and_leaves_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))

    assert answers(bundle).any()

    assert "has 10 bytes free" in caplog.text
    assert entries(root) == []


def test_write_that_fails_halfway_leaves_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sessions, "rewrite", full)

    assert answers(bundle).any()
    assert entries(root) == []


@pytest.mark.parametrize("file", ["weights.bin", "model.onnx", "entry.json"])
def test_damaged_entry_is_made_anew(bundle: Bundle, root: Path, file: str) -> None:
    expected = answers(bundle)
    (damaged,) = entries(root)
    size = (damaged / file).stat().st_size
    os.truncate(damaged / file, size - 1)

    np.testing.assert_array_equal(answers(bundle), expected)
    assert entries(root) == [damaged]
    assert (damaged / file).stat().st_size == size
    np.testing.assert_array_equal(answers(bundle), expected)


def test_entry_that_the_engine_refuses_is_no_obstacle(bundle: Bundle, root: Path) -> None:
    expected = answers(bundle)
    (entry,) = entries(root)
    model = entry / "model.onnx"
    model.write_bytes(b"\xff" * model.stat().st_size)

    np.testing.assert_array_equal(answers(bundle), expected)


def test_entry_of_another_cpu_is_not_used(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    answers(bundle)
    monkeypatch.setattr(packed_cache, "cpu_identity", lambda: "another")

    answers(bundle)

    assert len(entries(root)) == 2


def add(cache: PackedCache, name: str, age: float) -> Path:
    with cache.making(1) as folder:
        for file in ("model.onnx", "weights.bin"):
            (folder / file).write_text(name)
        model = cache.add({"name": name}, folder)
    os.utime(model.parent, times=(time.time() - age,) * 2)
    return model


def test_newest_entries_stay_and_use_counts(root: Path) -> None:
    cache = PackedCache(root)
    models = [add(cache, str(i), age=1000 - i) for i in range(packed_cache.MAX_ENTRIES)]
    assert cache.find({"name": "0"}) == models[0]

    newest = add(cache, "new", age=0)

    assert len(entries(root)) == packed_cache.MAX_ENTRIES
    assert newest.exists()
    assert models[0].exists()
    assert not models[1].exists()


def test_large_entries_go_though_they_are_few(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    cache = PackedCache(root)
    one = sum(file.stat().st_size for file in add(cache, "0", age=100).parent.iterdir())
    monkeypatch.setattr(packed_cache, "MAX_BYTES", 2 * one)
    add(cache, "1", age=50)
    assert cache.find({"name": "0"}) is not None

    add(cache, "2", age=20)
    assert [cache.find({"name": name}) is not None for name in "012"] == [True, False, True]

    monkeypatch.setattr(packed_cache, "MAX_BYTES", 1)
    add(cache, "3", age=0)
    assert [cache.find({"name": name}) is not None for name in "023"] == [False, False, True], (
        "the newest stays however large"
    )


def test_what_a_killed_process_left_goes_after_a_day(root: Path) -> None:
    old, young = root / ".making-old", root / ".making-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, times=(time.time() - 25 * 3600,) * 2)

    with PackedCache(root).making(1):
        pass

    assert entries(root) == [young]


def test_entry_that_came_meanwhile_is_taken(root: Path) -> None:
    cache = PackedCache(root)
    with cache.making(1) as folder:
        for file in ("model.onnx", "weights.bin"):
            (folder / file).write_text("ours")
        first = add(cache, "same", age=0)
        assert cache.add({"name": "same"}, folder) == first

    assert first.read_text() == "same"
    assert entries(root) == [first.parent]


LOAD = """
import sys, time
from pathlib import Path
from qwen_runtime.backends import sessions
from qwen_runtime.backends.onnxruntime import OnnxRuntimeRunner
from qwen_runtime.bundle import Bundle

sessions.MIN_CACHED_BYTES = 1
if sys.argv[2] == "stop":
    def stop(*_):
        print("stopped", flush=True)
        time.sleep(60)
    sessions.rewrite = stop
OnnxRuntimeRunner(Bundle.open(sys.argv[1]), threads=1).close()
"""


@pytest.mark.slow
def test_killed_process_leaves_no_entry_and_two_at_once_make_one(
    bundle: Bundle, root: Path
) -> None:
    def start(mode: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LOAD, str(bundle.path), mode]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start("stop") as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "stopped\n"
        killed.send_signal(signal.SIGKILL)
    assert [path.name[:8] for path in entries(root)] == [".making-"]

    both = [start("load"), start("load")]
    assert [process.wait() for process in both] == [0, 0]
    for process in both:
        process.stdout.close()  # type: ignore[union-attr]

    complete = [path for path in entries(root) if not path.name.startswith(".making-")]
    assert len(complete) == 1
    assert len(entries(root)) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xff", "IndexError"),
        (b"\x3a\x7f", "ends after its message"),
        (b"\x3b", "wire type 3"),
    ],
)
def test_file_of_another_form_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    model, data = tmp_path / "model.onnx", tmp_path / "data"
    model.write_bytes(content)
    data.write_bytes(b"")

    with pytest.raises(BackendError, match=f"a model that ONNX Runtime saved.*{reason}"):
        rewrite(model, data, tmp_path / "target")


def test_rewriting_keeps_every_byte_of_every_tensor(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    (tmp_path / "data").write_bytes(data)
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.UINT8, dims=[100])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    saved = {
        "location": "data",
        "offset": "3",
        "length": "100",
        "prepacked_0": "K|200;50;c|301;7;d",
    }
    for key, value in saved.items():
        tensor.external_data.add(key=key, value=value)
    small = onnx.helper.make_tensor("s", onnx.TensorProto.INT64, [2], [1, -1])
    graph = onnx.helper.make_graph([], "g", [], [], [tensor, small])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph), path)

    rewrite(path, tmp_path / "data", tmp_path / "target")

    moved = onnx.load(path, load_external_data=False)
    first, second = moved.graph.initializer
    entries = {entry.key: entry.value for entry in first.external_data}
    target = (tmp_path / "target").read_bytes()
    assert entries["location"] == "target"
    assert entries["prepacked_0"] == f"K|{ALIGNMENT};50;c|{2 * ALIGNMENT};7;d"
    assert target[:100] == data[3:103]
    assert target[ALIGNMENT:][:50] == data[200:250]
    assert target[2 * ALIGNMENT :] == data[301:308]
    assert second == small
