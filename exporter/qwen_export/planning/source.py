"""What is planned: a checkpoint's config and headers, whether or not it can be built."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_export.checkpoint import (
    Checkpoint,
    ModelConfig,
    TokenizerFiles,
    Tying,
    open_checkpoint,
    require_supported,
    resolve_tying,
)
from qwen_export.checkpoint.hub import download_small_files, is_hub_id, weights_names
from qwen_export.checkpoint.json_file import read_json_object
from qwen_export.checkpoint.tensors import EMBEDDING_NAME, LM_HEAD_NAME
from qwen_export.errors import CheckpointError, ExportError
from qwen_export.planning.headers import HeaderTensor, fetch_headers, read_headers

__all__ = ["Source", "open_source"]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint as its small files and headers describe it."""

    name: str
    """As it was given: a folder or a hub id."""
    revision: str | None
    """The commit of a hub id."""
    raw: Mapping[str, Any]
    """config.json."""
    raw_generation: Mapping[str, Any]
    """generation_config.json; empty without one."""
    stored: tuple[HeaderTensor, ...]
    """What the weights files hold."""
    checkpoint: Checkpoint | None
    """The opened checkpoint; None where it cannot be built."""
    config: ModelConfig | None
    """Its config; None where that cannot be read as one of a supported kind."""
    tying: Tying | None
    """None without ``config``."""
    tokenizer: TokenizerFiles | None
    refusal: str | None
    """Why it cannot be built; None where it can."""
    hollow: bool
    """Whether the weights are elsewhere: ``checkpoint`` knows their headers alone."""
    folder: Path
    """Where the small files are."""

    def named(self, message: str) -> str:
        """A message of the code that builds, with the model's name for a folder that is ours."""
        return message.replace(str(self.folder), self.name) if self.hollow else message


@contextmanager
def open_source(model: str | Path, *, revision: str | None = None) -> Iterator[Source]:
    """Open a model for planning: no weights are fetched, and none read but two tied tables.

    Args:
        model: A local folder, or a hub id. Of the latter the small files and the headers of the
            weights are fetched, where the cache does not hold the weights.
        revision: A branch, tag or commit of a hub id.

    Yields:
        The source. Its checkpoint may lie in a temporary folder that goes with the context.

    Raises:
        CheckpointError: If there is no such model, it cannot be fetched, or its config.json or a
            header is damaged. What else is wrong with it is its ``refusal``.
    """
    folder = Path(model).expanduser()
    if folder.exists() or not (isinstance(model, str) and is_hub_id(model)):
        if revision is not None or not (folder / "config.json").is_file():
            open_checkpoint(model, revision=revision)  # says what is wrong
        yield _source(str(model), None, folder, hollow=False)
        return
    cached = download_small_files(model, revision=revision)
    if not (cached / "config.json").is_file():
        raise CheckpointError(f"{model} is not a model that can be planned: it has no config.json")
    weights = weights_names(cached) or ["model.safetensors"]
    if all((cached / name).is_file() for name in weights):
        yield _source(model, cached.name, cached, hollow=False)
        return
    with tempfile.TemporaryDirectory(prefix="qwen-export-plan-") as scratch:
        stand_in = Path(scratch, Path(model).name)
        fetch_headers(model, cached, stand_in)
        yield _source(model, cached.name, stand_in, hollow=True)


def _source(name: str, revision: str | None, folder: Path, *, hollow: bool) -> Source:
    generation = folder / "generation_config.json"
    raw = read_json_object(folder / "config.json")
    checkpoint = tokenizer = refusal = None
    try:
        checkpoint = open_checkpoint(folder, hollow=hollow)
        require_supported(checkpoint.config)
        tokenizer = checkpoint.tokenizer_files()
        config: ModelConfig | None = checkpoint.config
    except ExportError as error:
        # A stand-in's folder says nothing to the user.
        refusal = str(error).replace(str(folder), name) if hollow else str(error)
        config = _config_alone(raw, folder) if checkpoint is None else checkpoint.config
        checkpoint = None
    return Source(
        name=name,
        revision=revision,
        raw=raw,
        raw_generation=read_json_object(generation) if generation.is_file() else {},
        stored=tuple(read_headers(folder)),
        checkpoint=checkpoint,
        config=config,
        tying=_tying(config, checkpoint, hollow=hollow),
        tokenizer=tokenizer,
        refusal=refusal,
        hollow=hollow,
        folder=folder,
    )


def _config_alone(raw: Mapping[str, Any], folder: Path) -> ModelConfig | None:
    try:
        return ModelConfig.from_dict(raw, folder / "config.json")
    except ExportError:
        return None


def _tying(
    config: ModelConfig | None, checkpoint: Checkpoint | None, *, hollow: bool
) -> Tying | None:
    if config is None:
        return None
    if checkpoint is None:
        tied = config.tie_word_embeddings
        return Tying(tied, EMBEDDING_NAME, EMBEDDING_NAME if tied else LM_HEAD_NAME)
    if not hollow:
        return checkpoint.resolve_tying()
    # Two tables of a tied model are one in every published checkpoint; the numbers are elsewhere.
    return resolve_tying(config, checkpoint.tensors, lambda _: np.zeros((1, 1), np.float32))
