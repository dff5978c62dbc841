"""The wheel: everything that is needed at run time, and nothing else."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {"qwen_export": "exporter", "qwen_runtime": "runtime"}


def tracked_files() -> list[str]:
    """What git would put in a clone: tracked files and new ones that it does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the files of the project are known only to git: {error}")
    return [name for name in done.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """A wheel built from a copy, so that the checkout stays as it is."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    for name in tracked_files():
        if name.split("/")[0] in ("benchmarks", "docs") or not (REPOSITORY / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, source / name)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
            *("--no-index", "--wheel-dir", str(root), str(source)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert done.returncode == 0, done.stderr
    (path,) = root.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "qwen_runtime/manifest.schema.json",
        "qwen_runtime/py.typed",
        "qwen_export/py.typed",
        "qwen_export/parity/page.css",
        "qwen_export/data/tiny-qwen2-chat/config.json",
        "qwen_export/data/tiny-qwen2-chat/model.safetensors",
        "qwen_export/data/tiny-qwen2-chat/tokenizer.json",
    ],
)
def test_the_wheel_holds_the_data_that_code_reads(wheel: zipfile.ZipFile, name: str) -> None:
    folder = PACKAGES[name.split("/")[0]]
    assert wheel.read(name) == (REPOSITORY / folder / name).read_bytes()


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_no_test(wheel: zipfile.ZipFile) -> None:
    expected = {
        name.split("/", 1)[1]
        for name in tracked_files()
        if name.startswith(tuple(f"{f}/{p}/" for p, f in PACKAGES.items()))
        and (REPOSITORY / name).is_file()
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert not [name for name in found if "test" in name]


@pytest.mark.slow
def test_the_wheel_installs_both_commands_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    entries = configparser.ConfigParser()
    entries.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(entries["console_scripts"]) == {
        "qwen-export": "qwen_export.cli:main",
        "qwen-run": "qwen_runtime.cli:main",
    }
    assert f"{info}/licenses/LICENSE" in wheel.namelist()


def imported_by(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(each for extra in extras for each in extra)]
    declared = {re.split(r"[^\w-]", each)[0].replace("-", "_") for each in requirements}
    imported = {
        name
        for package, folder in PACKAGES.items()
        for path in (REPOSITORY / folder / package).rglob("*.py")
        for name in imported_by(path)
    }
    foreign = imported - set(sys.stdlib_module_names) - PACKAGES.keys()
    assert {name for name in foreign if name not in declared} == set()
