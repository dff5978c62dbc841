"""The runtime stands alone: what it imports, how fast, and what it names as public."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qwen_runtime

PACKAGE = Path(qwen_runtime.__file__).parent
BUILD_TIME = (
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "qwen_export",
    "safetensors",
    "torch",
    "transformers",
)
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BUILD_TIME!r}:
            raise ImportError(f"{{name}} is blocked")
        return None

sys.meta_path.insert(0, Blocked())
"""


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def modules() -> Iterator[str]:
    for module in pkgutil.walk_packages([str(PACKAGE)], "qwen_runtime."):
        if not module.name.endswith("__main__"):
            yield module.name


def test_runtime_generates_with_every_build_time_package_blocked(text_bundle: Path) -> None:
    answer = python(
        BLOCK
        + f"""
import json
import qwen_runtime
llm = qwen_runtime.LLM({str(text_bundle)!r})
whole = llm.generate("Hello", max_new_tokens=8)
streamed = "".join(llm.stream("Hello", max_new_tokens=8))
print(json.dumps([whole.text, streamed, len(whole.token_ids)]))
"""
    )

    text, streamed, count = json.loads(answer)
    assert text == streamed
    assert 1 <= count <= 8


def test_every_module_imports_with_every_build_time_package_blocked() -> None:
    python(BLOCK + "".join(f"import {name}\n" for name in modules()))


def test_blocking_works() -> None:
    with pytest.raises(AssertionError, match="torch is blocked"):
        python(BLOCK + "import torch")


def test_importing_the_runtime_takes_less_than_half_a_second() -> None:
    measure = (
        "import time; t = time.perf_counter(); import qwen_runtime; print(time.perf_counter() - t)"
    )

    assert min(float(python(measure)) for _ in range(3)) < 0.5


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_runtime_file_names_a_build_time_package_in_an_import(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            imported.add(node.module or "")

    assert not {name.partition(".")[0] for name in imported} & set(BUILD_TIME)


@pytest.mark.parametrize(
    "name",
    # Names in the command line's modules are click's, not an API.
    ["qwen_runtime", *(name for name in modules() if ".cli." not in name)],
)
def test_all_names_every_public_class_and_function_of_a_module_in_order(name: str) -> None:
    module = importlib.import_module(name)
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    if not tree.body[1:]:  # a package that is only its docstring
        return
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    }

    named = module.__all__
    assert list(named) == sorted(named, key=_isort_key)
    assert all(hasattr(module, name) for name in named)
    assert public <= set(named)


def _isort_key(name: str) -> tuple[int, str]:
    """Constants, classes, functions: the order ruff keeps (RUF022)."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2
    return kind, name
