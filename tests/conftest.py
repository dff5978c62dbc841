"""Bundles built once per session, and what runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qwen_export.bundle import BuildOptions, build, embedded_model

if TYPE_CHECKING:
    from qwen_runtime import LLM

GOLDEN = Path(__file__).parent / "data" / "golden"

BuildBundle = Callable[..., Path]
GoldenLLM = Callable[[str], "LLM"]


@pytest.fixture(scope="session")
def build_bundle(tmp_path_factory: pytest.TempPathFactory) -> BuildBundle:
    """Builds the bundle of a checkpoint's folder without parity, once for the same arguments."""
    root = tmp_path_factory.mktemp("bundles")
    built: dict[tuple[Path, int | None], Path] = {}

    def bundle_of(model_folder: Path, *, max_context: int | None = None) -> Path:
        key = (model_folder.resolve(), max_context)
        if key not in built:
            output = root / f"{len(built)}-{model_folder.name}"
            build(model_folder, output, BuildOptions(max_context=max_context, verify=False))
            built[key] = output
        return built[key]

    return bundle_of


@pytest.fixture(scope="session")
def embedded_bundle(build_bundle: BuildBundle) -> Path:
    """The bundle of the embedded chat model; not to be changed."""
    return build_bundle(embedded_model())


@pytest.fixture(scope="session")
def embedded_llm(embedded_bundle: Path) -> Iterator[LLM]:
    """The embedded chat model, loaded."""
    from qwen_runtime import LLM

    with LLM(embedded_bundle) as llm:
        yield llm


@pytest.fixture(scope="session")
def draft_bundle(build_bundle: BuildBundle) -> Path:
    """The bundle of the embedded model's draft; not to be changed."""
    return build_bundle(GOLDEN.parent / "tiny-qwen2-draft")


@pytest.fixture(scope="session")
def golden_bundle(build_bundle: BuildBundle) -> Callable[[str], Path]:
    """The bundle of a golden checkpoint, by its name; not to be changed."""
    return lambda name: build_bundle(GOLDEN / "models" / name)


@pytest.fixture(scope="session")
def verified_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose parity passed; not to be changed."""
    folder = tmp_path_factory.mktemp("verified") / "bundle"
    return build(GOLDEN / "models" / "qwen2_untied", folder).path


@pytest.fixture(scope="session")
def golden_llm(golden_bundle: Callable[[str], Path]) -> Iterator[GoldenLLM]:
    """A golden checkpoint by its name, loaded."""
    from qwen_runtime import LLM

    loaded: dict[str, LLM] = {}

    def load(name: str) -> LLM:
        if name not in loaded:
            loaded[name] = LLM(golden_bundle(name))
        return loaded[name]

    yield load
    for llm in loaded.values():
        llm.close()


@pytest.fixture(scope="session")
def text_bundle(build_bundle: BuildBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights that has the golden tokenizer; not to be changed."""
    folder = tmp_path_factory.mktemp("checkpoint") / "text"
    shutil.copytree(GOLDEN / "models" / "qwen2_text", folder)
    shutil.copytree(GOLDEN / "tokenizer", folder, dirs_exist_ok=True)
    return build_bundle(folder)


@pytest.fixture(scope="session")
def text_llm(text_bundle: Path) -> Iterator[LLM]:
    """That model, loaded: fast, and it speaks text."""
    from qwen_runtime import LLM

    with LLM(text_bundle) as llm:
        yield llm


@pytest.fixture(scope="session")
def tiny_llm(golden_llm: GoldenLLM) -> LLM:
    """The smallest model: 128 tokens, no tokenizer, random weights."""
    return golden_llm("qwen2_untied")


@pytest.fixture
def eval_cases() -> list[dict[str, Any]]:
    """The held-out questions of the embedded model, with their answers."""
    text = (Path(__file__).parent / "data" / "eval_set.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded random numbers."""
    return np.random.default_rng(0)
