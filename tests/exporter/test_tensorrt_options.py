"""What an engine may be asked for, and whether it was built before: no TensorRT needed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_documents import write_engine

from qwen_export.errors import TargetError
from qwen_export.targets import engine_cache, flavours
from qwen_export.targets.engine_cache import EngineCache, cache_key
from qwen_export.targets.flavours import ALL_SMS, Target, load_target, select_sms
from qwen_export.targets.monitor import Phases, run_cancellable
from qwen_export.targets.options import EngineOptions
from qwen_export.targets.profiles import Profile, SizeRange
from qwen_runtime.bundle import Bundle
from qwen_runtime.manifest import Manifest


@pytest.fixture(scope="module")
def manifest(embedded_bundle: Path) -> Manifest:
    """A bundle's with a context of 2,048 tokens."""
    return Bundle.open(embedded_bundle).manifest


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "fp32"}, "bf16 or fp16, got fp32: TensorRT has no float32 attention"),
        ({"max_batch": 0}, "--max-batch must be a whole number of at least 1, got 0"),
        ({"max_batch": True}, "--max-batch must be a whole number of at least 1, got True"),
        ({"max_sequence": 1.5}, r"--max-sequence must be a whole number .* got 1\.5"),
        ({"capacity": -1}, "--capacity must be a whole number of at least 1, got -1"),
        ({"sms": (86, 0)}, "--sms must be a whole number of at least 1, got 0"),
    ],
)
def test_an_option_that_no_engine_can_have_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(TargetError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 2049}, "--capacity must not exceed the bundle's context of 2048 tokens"),
        (
            {"capacity": 64, "max_sequence": 65},
            "--max-sequence must not exceed the capacity of 64 tokens, got 65",
        ),
        ({"max_batch": 1}, "--max-batch must be at least 2, got 1: .* stores its weights twice"),
    ],
)
def test_limits_that_contradict_the_bundle_or_each_other_are_refused(
    manifest: Manifest, options: dict[str, Any], message: str
):
    with pytest.raises(TargetError, match=message):
        EngineOptions(**options).sizes(manifest)


def test_defaults_come_from_the_bundles_context(manifest: Manifest):
    sizes = EngineOptions().sizes(manifest)
    assert (sizes.max_batch, sizes.max_sequence, sizes.capacity) == (8, 1024, 2048)
    assert sizes.max_num_logits == 32
    small = EngineOptions(capacity=20).sizes(manifest)
    assert (small.max_sequence, small.max_num_logits) == (20, 20)


def test_one_engine_has_both_profiles_and_separate_ones_have_one_each(manifest: Manifest):
    sizes = EngineOptions(max_batch=4, max_sequence=16).sizes(manifest)
    batch = SizeRange(1, 1, 4)
    prefill = Profile.prefill(batch, SizeRange(1, 16, 16), SizeRange(1, 1, 16))
    assert sizes.profiles(["prefill", "decode"], "prefill") == [prefill, Profile.decode(batch)]
    assert sizes.profiles(["prefill"], "prefill") == [prefill]
    assert sizes.profiles(["decode"], "decode") == [Profile("decode", {"batch": batch})]


def test_a_single_row_is_allowed_to_separate_engines(manifest: Manifest):
    assert EngineOptions(max_batch=1, separate=True).sizes(manifest).max_batch == 1


def test_the_command_names_every_limit(manifest: Manifest):
    options = EngineOptions("fp16", separate=True)
    sizes = options.sizes(manifest)
    assert " ".join(options.command("tensorrt-rtx", sizes, (86, 89))) == (
        "--target tensorrt-rtx --compute-dtype fp16 --max-batch 8 --max-sequence 1024 "
        "--capacity 2048 --sms 86,89 --separate-engines"
    )
    assert "--sms" not in EngineOptions().command("tensorrt", sizes, None)


# --- targets ------------------------------------------------------------------------------------


def fake_module(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType(name)
    module.__version__ = version
    monkeypatch.setitem(sys.modules, name, module)


def test_an_unknown_target_is_refused():
    with pytest.raises(TargetError, match="must be one of tensorrt-rtx, tensorrt, got openvino"):
        load_target("openvino")


@pytest.mark.parametrize(
    ("name", "module"), [("tensorrt-rtx", "tensorrt_rtx_bindings"), ("tensorrt", "tensorrt")]
)
def test_a_target_that_is_not_installed_says_what_installs_it(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TargetError, match=rf"pip install 'qwen-export\[{name}\]'"):
        load_target(name)


@pytest.mark.parametrize(
    ("name", "module", "version"),
    [("tensorrt-rtx", "tensorrt_rtx_bindings", "1.6.0.2"), ("tensorrt", "tensorrt", "10.16.1.11")],
)
def test_a_release_this_was_not_written_for_is_refused(
    name: str, module: str, version: str, monkeypatch: pytest.MonkeyPatch
):
    fake_module(module, version, monkeypatch)
    with pytest.raises(TargetError, match=f"needs release .* of {module}, got {version}"):
        load_target(name)


def test_the_enterprise_target_needs_a_gpu(monkeypatch: pytest.MonkeyPatch):
    fake_module("tensorrt", "11.4.0.1", monkeypatch)
    target = load_target("tensorrt")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda(35, 0))
    with pytest.raises(
        TargetError, match="needs a GPU, but CUDA says cudaErrorInsufficientDriver"
    ):
        select_sms(target, None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(TargetError, match="needs a GPU and cuda-bindings"):
        select_sms(target, None)


def test_the_enterprise_target_builds_for_the_gpu_at_hand_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda(0, 9))
    target = Target("tensorrt", types.ModuleType("tensorrt"))
    assert select_sms(target, None) == (99,)
    with pytest.raises(TargetError, match="for the GPU at hand only, SM 99, got --sms 80"):
        select_sms(target, (80,))


def cuda(status: int, value: int) -> Any:
    """A CUDA runtime that gives one answer to every question."""
    names = {0: "cudaSuccess", 35: "cudaErrorInsufficientDriver"}
    codes = {code: types.SimpleNamespace(name=name) for code, name in names.items()}
    return types.SimpleNamespace(
        cudaDeviceAttr=types.SimpleNamespace(
            cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1
        ),
        cudaError_t=types.SimpleNamespace(cudaSuccess=codes[0]),
        cudaDeviceGetAttribute=lambda attribute, device: (codes[status], value),
    )


def test_gpus_are_sorted_and_named_once(monkeypatch: pytest.MonkeyPatch):
    trt = types.SimpleNamespace(
        ComputeCapability=types.SimpleNamespace(**{f"SM{sm}": sm for sm in ALL_SMS})
    )
    target = Target("tensorrt-rtx", trt)  # type: ignore[arg-type]
    assert select_sms(target, None) == ALL_SMS
    assert select_sms(target, (120, 86, 86)) == (86, 120)
    with pytest.raises(TargetError, match="at least one GPU generation"):
        select_sms(target, ())
    with pytest.raises(TargetError, match=r"SM must be one of .*, got 90"):
        select_sms(target, (90,))
    assert flavours.FLAVOURS == ("tensorrt-rtx", "tensorrt")


# --- progress -----------------------------------------------------------------------------------


def test_percent_follow_nested_phases_and_never_fall():
    gained: list[int] = []
    phases = Phases(gained.append)
    phases.start("build", None, 4)
    phases.start("clone", "build", 2)
    phases.step("clone", 0)
    assert sum(gained) == 12
    phases.step("clone", 1)
    phases.finish("clone")
    phases.step("build", 0)
    assert sum(gained) == 25
    phases.start("clone", "build", 4)
    phases.step("clone", 1)
    phases.step("unknown", 7)
    assert sum(gained) == 37
    assert all(amount > 0 for amount in gained)
    for step in range(1, 4):
        phases.step("build", step)
    assert sum(gained) == 100


def test_the_builder_is_told_to_stop_when_the_wait_for_it_is_interrupted():
    phases = Phases(lambda _: None)
    assert phases.step("build", 0)

    def work() -> None:
        # To this thread alone; the one that waits must hear of it nevertheless.
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        assert phases.cancelled.wait(10)

    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, phases.cancelled)
    assert not phases.step("build", 1)


def test_no_build_outlives_a_wait_that_is_interrupted_while_its_thread_starts(
    monkeypatch: pytest.MonkeyPatch,
):
    start, begun, cancelled = threading.Thread.start, threading.Event(), threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    def work() -> None:
        begun.set()
        cancelled.wait(10)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cancellable(work, cancelled)
    assert not begun.wait(0.2)


def test_what_a_build_raises_or_returns_reaches_the_caller():
    def fail() -> None:
        raise ValueError("wrong")

    cancelled = threading.Event()
    with pytest.raises(ValueError, match="wrong"):
        run_cancellable(fail, cancelled)
    assert run_cancellable(lambda: 7, cancelled) == 7
    assert not cancelled.is_set()


# --- engines built before -----------------------------------------------------------------------

MakeEngine = Callable[..., Path]


def test_a_cached_engine_is_found_by_its_key_alone(tmp_path: Path, make_engine: MakeEngine):
    cache, engine = EngineCache(tmp_path / "cache"), make_engine()
    key = cache_key({"weights": "1", "options": ["a"]})
    cache.add(key, engine)
    (tmp_path / "new").mkdir()
    assert not cache.fetch(cache_key({"weights": "2", "options": ["a"]}), tmp_path / "new")
    assert cache.fetch(key, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"engine.json", "engine.plan"}
    assert (tmp_path / "new" / "engine.plan").read_bytes() == b"plan"


@pytest.mark.parametrize("damage", [b"plam", b"pla"])
def test_a_damaged_entry_is_not_used_and_goes(
    tmp_path: Path, make_engine: MakeEngine, damage: bytes
):
    cache = EngineCache(tmp_path / "cache")
    cache.add("key", make_engine())
    plan = tmp_path / "cache" / "key" / "engine.plan"
    plan.unlink()
    plan.write_bytes(damage)
    (tmp_path / "new").mkdir()
    assert not cache.fetch("key", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    assert not plan.exists()


def test_the_entries_unused_for_longest_make_room(
    tmp_path: Path, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
):
    cache = EngineCache(tmp_path / "cache")
    for index in range(engine_cache.MAX_ENTRIES + 1):
        cache.add(str(index), make_engine())
        os.utime(cache.root / str(index), (index, index))
    assert sorted(path.name for path in cache.root.iterdir()) == ["1", "2", "3", "4"]
    size = sum(path.stat().st_size for path in make_engine().iterdir())
    monkeypatch.setattr(engine_cache, "MAX_BYTES", 2 * size)
    cache.add("5", make_engine())
    assert sorted(path.name for path in cache.root.iterdir()) == ["4", "5"]
    monkeypatch.setattr(engine_cache, "MAX_BYTES", size - 1)
    cache.add("6", make_engine())
    assert not (cache.root / "6").exists()


def test_what_an_interrupted_process_left_in_the_cache_goes_after_a_day(
    tmp_path: Path, make_engine: MakeEngine
):
    cache = EngineCache(tmp_path / "cache")
    for name in (".making-old", ".making-new"):
        (cache.root / name).mkdir(parents=True)
    os.utime(cache.root / ".making-old", (0, 0))
    cache.add("key", make_engine())
    assert sorted(path.name for path in cache.root.iterdir()) == [".making-new", "key"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, make_engine: MakeEngine):
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / "file" / "cache")
    cache.add("key", make_engine())
    assert not cache.fetch("key", tmp_path)


def test_the_cache_can_be_switched_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QWEN_EXPORT_CACHE", "off")
    assert EngineCache.of_user() is None


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    """Writes a small engine's folder."""

    def make() -> Path:
        folder = tmp_path / "engine"
        shutil.rmtree(folder, ignore_errors=True)
        return write_engine(folder)

    return make
