"""Fixtures: the golden checkpoints, and copies of them to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def golden_models() -> Path:
    return REPOSITORY / "tests/data/golden/models"


@pytest.fixture(scope="session")
def golden_tokenizer() -> Path:
    return REPOSITORY / "tests/data/golden/tokenizer"


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    return REPOSITORY / "exporter/qwen_export/data/tiny-qwen2-chat"


@pytest.fixture
def copy_of(tmp_path: Path, golden_models: Path) -> Callable[[str], Path]:
    """A copy of a golden model that a test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(golden_models / name, tmp_path / name))

    return copy


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change keys of a JSON file; a value of None removes the key."""

    def edit(path: Path, **changes: Any) -> None:
        value = json.loads(path.read_text(encoding="utf-8"))
        for key, change in changes.items():
            if change is None:
                value.pop(key, None)
            else:
                value[key] = change
        path.write_text(json.dumps(value), encoding="utf-8")

    return edit
