from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_export import staging
from qwen_export.errors import OutputError
from qwen_export.staging import install, require_absent, staging_folder


def bundle(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    return folder


def make(output: Path, content: str, *, overwrite: bool = True) -> None:
    with staging_folder(output) as folder:
        (folder / "manifest.json").write_text(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(content)
        install(folder, output, overwrite=overwrite)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_output_appears_complete_and_nothing_else_is_left(tmp_path):
    make(tmp_path / "new" / "out", "1")
    assert names(tmp_path / "new") == ["out"]
    assert names(tmp_path / "new" / "out") == ["deep", "manifest.json"]


def test_an_output_does_not_exist_before_it_is_complete(tmp_path):
    with staging_folder(tmp_path / "out") as folder:
        (folder / "manifest.json").write_text("1")
        assert not (tmp_path / "out").exists()
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path) == []


def test_an_old_output_is_replaced_whole(tmp_path):
    output = bundle(tmp_path / "out", "old")
    (output / "leftover").write_text("old")
    make(output, "new")
    assert names(tmp_path) == ["out"]
    assert names(output) == ["deep", "manifest.json"]
    assert (output / "manifest.json").read_text() == "new"


def test_an_old_output_is_replaced_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    output = bundle(tmp_path / "out", "old")
    make(output, "new")
    assert names(tmp_path) == ["out"]
    assert (output / "manifest.json").read_text() == "new"


def test_a_link_to_a_bundle_is_replaced_by_the_bundle(tmp_path):
    target = bundle(tmp_path / "elsewhere", "old")
    output = tmp_path / "out"
    output.symlink_to(target)
    make(output, "new")
    assert names(tmp_path) == ["elsewhere", "out"]
    assert not output.is_symlink()
    assert (output / "manifest.json").read_text() == "new"
    assert (target / "manifest.json").read_text() == "old"


def fail_half_way(output: Path) -> None:
    with staging_folder(output) as folder:
        (folder / "manifest.json").write_text("half")
        raise RuntimeError("broken")


def test_a_failed_build_leaves_the_old_output_and_nothing_else(tmp_path):
    output = bundle(tmp_path / "out", "old")
    with pytest.raises(RuntimeError, match="broken"):
        fail_half_way(output)
    assert names(tmp_path) == ["out"]
    assert (output / "manifest.json").read_text() == "old"


def test_an_existing_output_is_refused_without_overwrite(tmp_path):
    output = bundle(tmp_path / "out", "old")
    with pytest.raises(
        OutputError, match=r"out exists; choose another --output or pass"
    ) as caught:
        require_absent(output, overwrite=False)
    assert caught.value.path == output


def test_overwrite_accepts_a_bundle_an_empty_folder_and_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    require_absent(bundle(tmp_path / "bundle", "old"), overwrite=True)
    require_absent(tmp_path / "empty", overwrite=True)
    require_absent(tmp_path / "nothing", overwrite=False)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_overwrite_refuses_what_is_no_bundle(tmp_path, kind):
    output = tmp_path / "precious"
    if kind == "folder":
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
    elif kind == "file":
        output.write_text("years of work")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"is not a bundle \(it has no manifest\.json\)"):
        require_absent(output, overwrite=True)
    assert names(tmp_path) == ["precious"]


# --- outputs that appear during a build ---------------------------------------------------------


@pytest.fixture(params=["atomic", "plain rename"])
def renaming(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's exclusive rename and without."""
    if request.param != "atomic":
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    return str(request.param)


@pytest.mark.usefixtures("renaming")
def test_an_output_that_appears_during_the_build_is_kept(tmp_path):
    output = tmp_path / "out"

    def build() -> None:
        with staging_folder(output) as folder:
            bundle(folder / "deep", "ours")
            bundle(output, "theirs")
            install(folder, output, overwrite=False)

    with pytest.raises(OutputError, match="out exists; choose another --output") as caught:
        build()
    assert caught.value.path == output
    assert names(tmp_path) == ["out"]
    assert (output / "manifest.json").read_text() == "theirs"


@pytest.mark.usefixtures("renaming")
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_appears_after_the_last_check_is_kept(tmp_path, monkeypatch, kind):
    output = tmp_path / "out"
    checks = []

    def check(path: Path, *, overwrite: bool) -> None:
        checks.append(path)
        require_absent(path, overwrite=overwrite)

    exists = Path.exists

    def appear(path: Path) -> bool:
        found = exists(path)
        if path == output and not found and checks:
            bundle(output, "theirs") if kind == "folder" else output.write_text("theirs")
        return found

    # A check that finds nothing is followed by the other's output at once.
    monkeypatch.setattr(staging, "require_absent", check)
    monkeypatch.setattr(Path, "exists", appear)
    with pytest.raises(OutputError, match="out exists; choose another --output"):
        make(output, "ours", overwrite=False)
    monkeypatch.undo()
    assert len(checks) == 2
    assert names(tmp_path) == ["out"]
    theirs = output / "manifest.json" if kind == "folder" else output
    assert theirs.read_text() == "theirs"


@pytest.mark.usefixtures("renaming")
def test_a_new_output_appears_under_a_name_that_is_free(tmp_path):
    make(tmp_path / "out", "new", overwrite=False)
    assert names(tmp_path) == ["out"]


def test_overwrite_keeps_what_is_no_bundle_and_appears_during_the_build(tmp_path):
    output = tmp_path / "precious"

    def build() -> None:
        with staging_folder(output) as folder:
            bundle(folder / "deep", "ours")
            output.mkdir()
            (output / "thesis.txt").write_text("years of work")
            install(folder, output, overwrite=True)

    with pytest.raises(OutputError, match="precious exists and is not a bundle"):
        build()
    assert names(tmp_path) == ["precious"]
    assert names(output) == ["thesis.txt"]


# --- builds that die ----------------------------------------------------------------------------

_HALF_A_BUILD = """
import sys, time
from pathlib import Path
from qwen_export.staging import staging_folder
with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "manifest.json").write_text("half")
    (folder / "weights.bin").write_bytes(bytes(1000))
    print(folder.name, flush=True)
    time.sleep(600)
"""


def start_half_a_build(output: Path) -> tuple[subprocess.Popen[str], str]:
    child = subprocess.Popen(
        [sys.executable, "-c", _HALF_A_BUILD, str(output)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    return child, child.stdout.readline().strip()


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


def test_a_killed_build_leaves_the_old_output_and_the_next_build_clears_up(tmp_path):
    output = bundle(tmp_path / "out", "old")
    child, hidden = start_half_a_build(output)
    kill(child)
    assert names(tmp_path) == [hidden, "out"]
    assert names(output) == ["manifest.json"]
    assert (output / "manifest.json").read_text() == "old"
    make(output, "new")
    assert names(tmp_path) == ["out"]
    assert (output / "manifest.json").read_text() == "new"


def test_a_running_build_and_other_outputs_are_left_alone(tmp_path):
    child, hidden = start_half_a_build(tmp_path / "out")
    others = [hidden.replace(".out", ".other"), ".out.building-x", hidden.removeprefix(".")]
    for name in others:
        (tmp_path / name).mkdir()
    try:
        make(tmp_path / "out", "new")
        assert names(tmp_path) == sorted([*others, hidden, "out"])
    finally:
        kill(child)


def test_builds_of_one_process_leave_each_other_alone(tmp_path):
    with staging_folder(tmp_path / "out") as first:
        (first / "half").write_text("half")
        thread = threading.Thread(target=make, args=(tmp_path / "out", "second"))
        thread.start()
        thread.join(timeout=30)
        assert names(tmp_path) == [first.name, "out"]
        assert names(first) == ["half"]
    assert names(tmp_path) == ["out"]


def test_a_folder_left_by_a_dead_process_of_this_process_id_is_cleared(tmp_path):
    leftover = tmp_path / f".out.building-{os.getpid()}-0123abcd-1"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with staging_folder(tmp_path / "out") as folder:
        assert names(folder) == []


_KILLED_BUILD = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from qwen_export.bundle import BuildOptions, build

@contextmanager
def progress(label, total=None, *, unit=""):
    def advance(amount):
        if label == "Writing weights":
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance

build(None, Path(sys.argv[1]), BuildOptions(verify=False), overwrite=True, progress=progress)
"""


@pytest.mark.slow
def test_a_build_killed_while_it_writes_weights_leaves_the_old_bundle(tmp_path):
    output = bundle(tmp_path / "out", "old")
    child = subprocess.run(
        [sys.executable, "-c", _KILLED_BUILD, str(output)], capture_output=True, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    hidden, kept = names(tmp_path)
    assert kept == "out"
    assert "weights.bin" in names(tmp_path / hidden)
    assert (output / "manifest.json").read_text() == "old"
    make(output, "new")
    assert names(tmp_path) == ["out"]


# --- disks that are full ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_error_and_leaves_nothing(small_disk):
    output = bundle(small_disk / "out", "old")
    with (
        pytest.raises(OutputError, match=r"No space left on device \(0 MB free\); free some"),
        staging_folder(output) as folder,
    ):
        (folder / "weights.bin").write_bytes(bytes(4 << 20))
    assert names(small_disk) == ["out"]
    assert (output / "manifest.json").read_text() == "old"


_LIMITED_BUILD = """
import resource, sys
from pathlib import Path
from qwen_export.errors import OutputError
from qwen_export.staging import staging_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with staging_folder(Path(sys.argv[1])) as folder:
        (folder / "weights.bin").write_bytes(bytes(4 << 20))
except OutputError as error:
    print(error)
"""


def test_a_file_beyond_the_limit_is_one_error_and_leaves_nothing(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", _LIMITED_BUILD, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "could not be written: File too large (" in child.stdout
    assert "MB free); free some space or choose another --output. Nothing was" in child.stdout
    assert names(tmp_path) == []


def test_other_errors_of_the_system_are_not_renamed(tmp_path):
    with pytest.raises(OSError, match="Input/output error"), staging_folder(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert names(tmp_path) == []


def test_an_output_that_cannot_be_created_is_one_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(OutputError, match=r"must be writable: (Not a directory|File exists)"),
        staging_folder(tmp_path / "file" / "out"),
    ):
        pytest.fail("the folder cannot exist")


def test_the_package_exports_what_it_lists():
    assert set(staging.__all__) == {"install", "require_absent", "staging_folder"}
