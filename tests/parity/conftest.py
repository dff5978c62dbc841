"""Golden models as parity tests need them: opened, run by PyTorch, verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qwen_export.checkpoint import Checkpoint, open_checkpoint
from qwen_export.parity import ParityReport, verify
from qwen_runtime.bundle import Bundle

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

FullModel = Callable[[str], Any]


@pytest.fixture(scope="session")
def golden_checkpoint() -> Callable[[str], Checkpoint]:
    """A golden checkpoint by its name, opened."""
    return lambda name: open_checkpoint(GOLDEN / "models" / name)


@pytest.fixture(scope="session")
def forward() -> dict[str, np.ndarray[Any, Any]]:
    """Logits of the golden models, computed by transformers and stored."""
    with np.load(GOLDEN / "forward.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def full_model() -> FullModel:
    """A golden model by its name, whole, in transformers: fp32, eager attention."""
    transformers.utils.logging.disable_progress_bar()
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            loaded[name] = transformers.AutoModelForCausalLM.from_pretrained(
                GOLDEN / "models" / name, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def untied_report(
    golden_bundle: Callable[[str], Path], golden_checkpoint: Callable[[str], Checkpoint]
) -> ParityReport:
    """The report of one sound bundle."""
    return verify(Bundle.open(golden_bundle("qwen2_untied")), golden_checkpoint("qwen2_untied"))


@pytest.fixture
def untied_copy(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of one sound bundle, to be tampered with."""
    return Path(shutil.copytree(golden_bundle("qwen2_untied"), tmp_path / "bundle"))
