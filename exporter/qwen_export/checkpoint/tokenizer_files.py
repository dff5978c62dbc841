"""The tokenizer of a checkpoint as one tokenizer.json and the settings beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_export.checkpoint.config import ModelConfig
from qwen_export.checkpoint.json_file import read_json_object, read_text
from qwen_export.checkpoint.special_tokens import SpecialTokens, read_special_tokens
from qwen_export.checkpoint.tokenizer_json import build_tokenizer_json
from qwen_export.errors import CheckpointError, UnsupportedModelError

__all__ = ["TokenizerFiles", "read_tokenizer_files"]

# transformers writes 1e30 where there is no limit.
_NO_LIMIT = 10**20
# A template's name becomes a file name of the bundle.
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_QWEN_CLASS = "Qwen2Tokenizer"
# Classes that take tokenizer.json as it stands. LlamaTokenizer is what some derived models name
# for a tokenizer.json of Qwen's byte-level kind; transformers then takes the file as well.
_PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Everything text needs, in the form a bundle stores."""

    tokenizer_json: str
    """A complete tokenizer.json, added tokens merged in, without padding or truncation."""
    special_tokens: Mapping[str, str]
    """Text by role ("eos_token", "pad_token", ...); only the roles that are set."""
    split_special_tokens: bool
    """True: special tokens in a text are split like any other text."""
    model_max_length: int | None
    """Tokens; None where the tokenizer sets no limit."""
    chat_templates: Mapping[str, str]
    """Jinja source by name, "default" for the only or main one; empty without a template."""


def read_tokenizer_files(folder: Path, config: ModelConfig) -> TokenizerFiles | None:
    """Read the tokenizer of a checkpoint.

    The result encodes and decodes as transformers' AutoTokenizer does for the same folder: for
    Qwen's own class the pipeline is rebuilt, and tokenizer.json (or vocab.json and merges.txt)
    gives vocabulary, merges, post-processor and added tokens.

    Args:
        folder: The checkpoint.
        config: Its config; the model type decides which tokenizer class holds.

    Returns:
        The tokenizer, or None where the folder has neither tokenizer.json nor vocab.json and
        merges.txt.

    Raises:
        CheckpointError: If a file is damaged, one of vocab.json and merges.txt is missing, or an
            added token cannot have the id it claims.
        UnsupportedModelError: If the tokenizer is not a byte-level BPE of Qwen's kind.

    Source:
        Qwen2Tokenizer, TokenizersBackend and AutoTokenizer of transformers 5.23.
    """
    if not _has_tokenizer(folder):
        return None
    config_path = folder / "tokenizer_config.json"
    settings = read_json_object(config_path) if config_path.is_file() else {}
    qwen_class = _is_qwen_class(settings, config, config_path)
    special = read_special_tokens(folder, settings, qwen_class=qwen_class)
    return TokenizerFiles(
        tokenizer_json=build_tokenizer_json(folder, settings, special, qwen_class=qwen_class),
        special_tokens=_texts(special),
        split_special_tokens=_split_special_tokens(settings, config_path),
        model_max_length=_model_max_length(settings, config_path),
        chat_templates=_chat_templates(folder, settings, config_path),
    )


def _has_tokenizer(folder: Path) -> bool:
    if (folder / "tokenizer.json").is_file():
        return True
    present = [name for name in ("vocab.json", "merges.txt") if (folder / name).is_file()]
    if len(present) == 1:
        missing = "merges.txt" if present == ["vocab.json"] else "vocab.json"
        raise CheckpointError(
            f"{folder} has {present[0]} but no {missing}; a tokenizer needs both, or "
            "tokenizer.json",
            path=folder / missing,
        )
    return bool(present)


def _is_qwen_class(settings: Mapping[str, Any], config: ModelConfig, path: Path) -> bool:
    # transformers trusts the class a file names for qwen3, and never for qwen2.
    name = settings.get("tokenizer_class")
    if name is None or config.model_type == "qwen2":
        return True
    base = str(name).removesuffix("Fast")
    if base == _QWEN_CLASS:
        return True
    if base not in _PLAIN_CLASSES:
        raise UnsupportedModelError(
            f"{path}: tokenizer_class {name!r} is not supported; {_QWEN_CLASS} and "
            f"{' and '.join(_PLAIN_CLASSES)} with a tokenizer.json are",
            key="tokenizer_class",
        )
    return False


def _texts(special: SpecialTokens) -> dict[str, str]:
    return {role: str(token.content) for role, token in special.roles.items()}


def _split_special_tokens(settings: Mapping[str, Any], path: Path) -> bool:
    value = settings.get("split_special_tokens", False)
    if not isinstance(value, bool):
        raise CheckpointError(
            f"{path}: split_special_tokens must be true or false, got {value!r}", path=path
        )
    return value


def _model_max_length(settings: Mapping[str, Any], path: Path) -> int | None:
    value = settings.get("model_max_length", settings.get("max_len"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
        raise CheckpointError(
            f"{path}: model_max_length must be a number >= 1 or null, got {value!r}", path=path
        )
    return None if value >= _NO_LIMIT else int(value)


def _chat_templates(folder: Path, settings: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Files come first; if there is one, tokenizer_config.json is not asked."""
    templates = {}
    default = folder / "chat_template.jinja"
    if default.is_file():
        templates["default"] = read_text(default)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[_template_name(file.stem, file)] = read_text(file)
    if templates:
        return templates
    given = settings.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    entries = given if isinstance(given, list) else [given]
    for entry in entries:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), str) for key in ("name", "template")
        ):
            raise CheckpointError(
                f"{path}: chat_template must be a string or a list of objects with name and "
                f"template, got {type(given).__name__}",
                path=path,
            )
        templates[_template_name(entry["name"], path)] = entry["template"]
    return templates


def _template_name(name: str, path: Path) -> str:
    if not _TEMPLATE_NAME.fullmatch(name):
        raise CheckpointError(
            f"{path}: the name of a chat template must be letters, digits, '_', '-' and '.', and "
            f"begin with none of the last two, got {name!r}; rename it",
            path=path,
        )
    return name
