from __future__ import annotations

from pathlib import Path

import pytest

from qwen_runtime.bundle import Bundle


@pytest.fixture(scope="session")
def tiny_bundle(embedded_bundle: Path) -> Bundle:
    """The embedded model's bundle, built once, not verified."""
    return Bundle.open(embedded_bundle)
