"""Fetching a checkpoint from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qwen_export.checkpoint.config import ModelConfig
from qwen_export.checkpoint.json_file import read_json_object
from qwen_export.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "download_checkpoint",
    "download_small_files",
    "is_hub_id",
    "refuse_other_formats",
    "reports_hub_errors",
    "weights_names",
]

# Everything but the weights; small, and enough to refuse a model before its weights are fetched.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")


def is_hub_id(model: str) -> bool:
    """Say whether a text has the form of a hub id, ``owner/name``."""
    return _HUB_ID.fullmatch(model) is not None


def download_checkpoint(repo_id: str, *, revision: str | None = None) -> Path:
    """Fetch the files of a checkpoint that an export needs, and no others.

    Files already in huggingface_hub's cache are not fetched again. The config is read before the
    weights are fetched. The environment variables of huggingface_hub (HF_ENDPOINT, HF_HOME,
    HF_TOKEN, HF_HUB_OFFLINE) hold.

    Args:
        repo_id: The model, ``owner/name``.
        revision: A branch, tag or commit; None is the main branch.

    Returns:
        The folder in the cache; its name is the commit that was fetched.

    Raises:
        CheckpointError: If the model or revision does not exist, is gated, or cannot be fetched.
        UnsupportedModelError: If its config is refused.
    """
    folder = download_small_files(repo_id, revision=revision)
    config_path = folder / "config.json"
    if not config_path.is_file():
        # The reader names what is missing from a folder.
        return folder
    ModelConfig.from_dict(read_json_object(config_path), config_path)
    # The commit just resolved, so that a push in between cannot mix two versions.
    folder = _snapshot(repo_id, folder.name, ["model.safetensors", *weights_names(folder)])
    if not any(folder.glob("*.safetensors")):
        refuse_other_formats(repo_id, folder.name)
    return folder


def download_small_files(repo_id: str, *, revision: str | None = None) -> Path:
    """Fetch everything of a checkpoint but its weights; see `download_checkpoint`.

    Returns:
        The folder in the cache; its name is the commit that was fetched. Weights are in it where
        an earlier call fetched them.
    """
    return _snapshot(repo_id, revision, _SMALL_FILES)


def weights_names(folder: Path) -> list[str]:
    """Names of the weights files that a checkpoint's index speaks of, sorted; none without one.

    Raises:
        CheckpointError: If the index cannot be read.
    """
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        return []
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        return []
    return sorted({str(file) for file in weight_map.values()})


def _snapshot(repo_id: str, revision: str | None, files: Sequence[str]) -> Path:
    # Imported here: it takes longer than the rest of the package, and a folder needs none of it.
    from huggingface_hub import snapshot_download

    with reports_hub_errors(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files)))


@contextmanager
def reports_hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a CheckpointError that says what to do."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # made on access

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms on the hub and log in with `hf auth login`, or "
            "give a local folder"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is neither a folder here nor a model on the hub (a private one needs "
            "`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} has no revision {revision!r}; give a branch, tag or commit of it"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{repo_id} cannot be fetched: the hub is out of reach and the cache does not hold it "
            "whole; go online or give a local folder"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{repo_id} cannot be fetched from the hub: {reason}") from error


def refuse_other_formats(repo_id: str, revision: str) -> NoReturn:
    """Name the weights that are there, where none can be read.

    Args:
        repo_id: The model.
        revision: The commit that was fetched.

    Raises:
        CheckpointError: Always.
    """
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # made on access

    try:
        files = HfApi().list_repo_files(repo_id, revision=revision)
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, httpx.HTTPError) as error:
        raise CheckpointError(f"{repo_id} holds no safetensors weights") from error
    others = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".gguf")))
    found = f"only {others[0]}" if others else "no weights"
    raise CheckpointError(f"{repo_id} holds {found}; a checkpoint must have safetensors weights")
