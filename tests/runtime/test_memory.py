"""Free memory: the machine's, or what the control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_runtime import memory


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 KiB are free, and the process is in the group /service/worker."""
    (tmp_path / "meminfo").write_text("MemTotal: 99999 kB\nMemAvailable:   10000 kB\n")
    (tmp_path / "own").write_text("0::/service/worker\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")


def limit(folder: Path, maximum: str, current: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_machine_without_limits_gives_what_it_has_free(tmp_path: Path) -> None:
    limit(tmp_path / "groups/service/worker", "max", 5)

    assert memory.available_bytes() == 10_000 * 1024


@pytest.mark.parametrize("group", ["", "service", "service/worker"])
def test_limit_of_any_group_around_the_process_counts(tmp_path: Path, group: str) -> None:
    limit(tmp_path / "groups/service/worker", "max", 5)
    limit(tmp_path / "groups" / group, "5000", 1000)

    assert memory.available_bytes() == 4000


def test_pages_of_files_that_nobody_reads_are_free(tmp_path: Path) -> None:
    limit(tmp_path / "groups/service/worker", "5000", 4900, inactive=3000)

    assert memory.available_bytes() == 3100


def test_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    limit(tmp_path / "groups/service/worker", "5000", 5100)

    assert memory.available_bytes() == 0


def test_machine_without_proc_is_taken_to_be_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "missing")
    monkeypatch.setattr(memory, "_OWN_GROUP", tmp_path / "missing")

    assert memory.available_bytes() >= 2**20
