"""`qwen-run bench` as users call it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qwen_runtime.cli import main

QUICK = ("--prompt-tokens", "6", "--new-tokens", "2", "--repeat", "1", "--threads", "1")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, args)])


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_runtime.bench.benchmark.read_bandwidth", lambda threads: 1e10)


def test_bench_prints_a_table_and_keeps_progress_out_of_it(embedded_bundle: Path) -> None:
    result = run(embedded_bundle, *QUICK)
    assert result.exit_code == 0, result.output
    assert "Measuring" in result.stderr
    assert "Measuring" not in result.stdout
    assert "Warning: the bundle was not verified" in result.stderr
    assert result.stdout.startswith("tiny-qwen2-chat: fp32 weights")
    assert "read bandwidth 10.0 GB/s" in result.stdout
    *lines, repeat = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert repeat.startswith("Repeat: ")
    assert f"Repeat: qwen-run bench {embedded_bundle} --prompt-tokens 6" in result.stdout


def test_bench_json_is_one_document(embedded_bundle: Path) -> None:
    document = json.loads(run(embedded_bundle, *QUICK, "--batch", "2", "--json").stdout)
    assert document["options"] == {
        "prompt_tokens": [6],
        "new_tokens": 2,
        "batch": 2,
        "repeat": 1,
        "threads": 1,
        "seed": 0,
    }
    assert document["lengths"][0]["prompt_tokens"] == 6
    assert document["read_bandwidth"] == 1e10


def test_bench_draws_a_page_and_leaves_nothing_else(embedded_bundle: Path, tmp_path: Path) -> None:
    plot = tmp_path / "speed.html"
    result = run(embedded_bundle, *QUICK, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert plot.read_text("utf-8").startswith("<!doctype html>")
    assert f"Drawn: {plot}" in result.stderr
    assert list(tmp_path.iterdir()) == [plot]


def test_bench_replaces_a_page_only_where_told_to(embedded_bundle: Path, tmp_path: Path) -> None:
    plot = tmp_path / "speed.html"
    plot.write_text("mine")
    refused = run(embedded_bundle, *QUICK, "--plot", plot)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "exists; pass --overwrite to replace it" in refused.stderr
    assert plot.read_text() == "mine"
    assert run(embedded_bundle, *QUICK, "--plot", plot, "--overwrite").exit_code == 0
    assert plot.read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("plot", "code", "message"),
    [
        ("speed.png", 2, "must end in .html, got speed.png"),
        ("missing/speed.html", 1, "missing is none; make it first"),
        ("folder.html", 1, "folder.html is a folder"),
        ("/proc/speed.html", 1, "--plot must be writable, but /proc/speed.html is not"),
    ],
)
def test_bench_refuses_a_page_it_cannot_write_before_it_measures(
    embedded_bundle: Path, tmp_path: Path, plot: str, code: int, message: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    result = run(embedded_bundle, *QUICK, "--plot", tmp_path / plot)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Measuring" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompt-tokens", "0"], 2, "0 is not in the range x>=1"),
        (["--new-tokens", "0"], 2, "0 is not in the range x>=2"),
        (["--batch", "0"], 2, "0 is not in the range x>=1"),
        (["--repeat", "0"], 2, "0 is not in the range x>=1"),
        (["--threads", "0"], 2, "0 is not in the range x>=1"),
        (["--seed", "-1"], 2, "-1 is not in the range x>=0"),
        (["--overwrite"], 2, "--overwrite belongs to --plot"),
        (["--prompt-tokens", "5", "--prompt-tokens", "5"], 2, "'--prompt-tokens': must differ"),
        (["--batch", str(10**18)], 1, "batch must be a number of rows that there is memory for"),
        (["--prompt-tokens", "2048"], 1, "prompt_tokens must be at most 2017"),
        (["--new-tokens", "5000"], 1, "prompt_tokens must be at most"),
    ],
)
def test_bench_refuses_what_makes_no_sense_in_one_sentence(
    embedded_bundle: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run(embedded_bundle, *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert result.stderr.count("Error:") == 1


def test_bench_refuses_a_missing_folder(tmp_path: Path) -> None:
    result = run(tmp_path / "none", *QUICK)
    assert result.exit_code == 1
    assert "must be a bundle's folder, but is none" in result.stderr


def test_bench_refuses_a_bundle_whose_parity_failed(embedded_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(embedded_bundle, bundle)
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text("utf-8"))
    manifest["parity"]["status"] = "failed"
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    result = run(bundle, *QUICK)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "does not answer like its checkpoint: parity failed" in result.stderr
