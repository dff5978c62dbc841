"""A draft for the smallest model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest

from qwen_runtime import LLM


@pytest.fixture
def draft(golden_llm: Callable[[str], LLM]) -> Iterator[LLM]:
    """A draft for `tiny_llm`; its settings are put back afterwards."""
    llm = golden_llm("qwen2_draft")
    before = llm.generation_config
    llm.generation_config = dataclasses.replace(
        before, num_assistant_tokens=4, assistant_confidence_threshold=0.0
    )
    yield llm
    llm.generation_config = before
