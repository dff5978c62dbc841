"""Special and added tokens, gathered from the places a checkpoint may keep them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from qwen_export.checkpoint.json_file import read_json_object
from qwen_export.errors import CheckpointError

__all__ = ["SpecialTokens", "read_special_tokens"]

# In transformers' order, which decides the ids of tokens that have none yet.
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# What Qwen2Tokenizer assumes where a role is not mentioned; null un-sets it.
_QWEN_DEFAULTS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_TOKEN_OPTIONS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# The tokens every Qwen vocabulary continues with, where the files list no added tokens at all.
_QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The tokens that are not made by merges."""

    added: Mapping[int, AddedToken]
    """Added tokens by the id they claim."""
    roles: Mapping[str, AddedToken]
    """Named special tokens ("eos_token", ...), in the order they are added."""
    extra: tuple[AddedToken, ...]
    """Special tokens without a role."""

    def named(self) -> list[AddedToken]:
        """List every special token once, those with a role first."""
        unique: dict[str, AddedToken] = {}
        for token in (*self.roles.values(), *self.extra):
            unique.setdefault(token.content, token)
        return list(unique.values())


def read_special_tokens(
    folder: Path, settings: Mapping[str, Any], *, qwen_class: bool
) -> SpecialTokens:
    """Gather the special and added tokens of a checkpoint.

    added_tokens_decoder of tokenizer_config.json is the whole list where it exists; without it
    special_tokens_map.json, added_tokens.json and tokenizer.json are read, in that order.

    Args:
        folder: The checkpoint.
        settings: Its tokenizer_config.json, or an empty mapping.
        qwen_class: Whether Qwen2Tokenizer's defaults hold.

    Returns:
        The tokens.

    Raises:
        CheckpointError: If an entry is not a token, or an id not an integer >= 0.
    """
    path = folder / "tokenizer_config.json"
    values = dict(settings)
    decoder = values.get("added_tokens_decoder")
    if decoder is None:
        path = folder / "special_tokens_map.json"
        if path.is_file():
            values.update(read_json_object(path))
    roles, extra = _named(values, path, qwen_class=qwen_class)
    if decoder is not None:
        added = _decoder(decoder, path)
    else:
        special = {token.content for token in (*roles.values(), *extra)}
        added = _legacy_added(folder, special, qwen_class=qwen_class)
    # A role takes the flags of the added token of the same text, and makes it special.
    listed = {token.content: token for token in added.values()}
    roles = {role: listed.get(token.content, token) for role, token in roles.items()}
    for token in roles.values():
        token.special = True
    return SpecialTokens(added, roles, extra)


def _named(
    values: Mapping[str, Any], path: Path, *, qwen_class: bool
) -> tuple[dict[str, AddedToken], tuple[AddedToken, ...]]:
    given = {**_QWEN_DEFAULTS, **values} if qwen_class else dict(values)
    listed = given.get("extra_special_tokens") or given.get("additional_special_tokens") or []
    own = {
        key: value
        for key, value in given.items()
        if key.endswith("_token") and key not in _ROLES and isinstance(value, str | dict)
    }
    if isinstance(listed, dict):
        # transformers' spelling for further roles, such as image_token.
        own.update(listed)
        listed = []
    if not isinstance(listed, list):
        raise CheckpointError(
            f"{path}: additional_special_tokens must be a list or an object, got {listed!r}",
            path=path,
        )
    roles = {key: given[key] for key in _ROLES if given.get(key) is not None} | own
    return (
        {key: _special(value, key, path) for key, value in roles.items()},
        tuple(_special(value, "additional_special_tokens", path) for value in listed),
    )


def _special(value: object, key: str, path: Path) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    token = _token(value, key, path)
    token.special = True
    return token


def _token(value: object, key: str, path: Path) -> AddedToken:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(
            f"{path}: {key} must be a string or an object with content, got {value!r}", path=path
        )
    options = {name: option for name, option in value.items() if name != "__type"}
    # The library prints a line for an option it does not know, and goes on without it.
    unknown = sorted(options.keys() - _TOKEN_OPTIONS)
    if unknown:
        raise CheckpointError(
            f"{path}: {key} has the unknown option {unknown[0]!r}; {', '.join(_TOKEN_OPTIONS)} "
            "are known",
            path=path,
        )
    try:
        return AddedToken(**options)
    except TypeError as error:
        raise CheckpointError(f"{path}: {key} is not a token: {error}", path=path) from error


def _decoder(decoder: object, path: Path) -> dict[int, AddedToken]:
    if not isinstance(decoder, dict):
        raise CheckpointError(
            f"{path}: added_tokens_decoder must be an object, got {decoder!r}", path=path
        )
    return {
        _token_id(key, path): _token(value, f"added_tokens_decoder.{key}", path)
        for key, value in decoder.items()
    }


def _legacy_added(folder: Path, special: set[str], *, qwen_class: bool) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    path = folder / "added_tokens.json"
    if path.is_file():
        for content, token_id in read_json_object(path).items():
            is_special = content in special
            added[_token_id(token_id, path)] = AddedToken(
                content, special=is_special, normalized=not is_special
            )
    path = folder / "tokenizer.json"
    if path.is_file():
        listed = read_json_object(path).get("added_tokens") or []
        for entry in listed:
            options = dict(entry)
            token_id = _token_id(options.pop("id", None), path)
            added[token_id] = _token(options, "added_tokens", path)
    elif not added and qwen_class:
        vocabulary = read_json_object(folder / "vocab.json")
        missing = [content for content in _QWEN_TOKENS if content not in vocabulary]
        for token_id, content in enumerate(missing, len(vocabulary)):
            added[token_id] = AddedToken(content, special=True, normalized=False)
    return added


def _token_id(value: object, path: Path) -> int:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"{path}: the id of an added token must be an integer >= 0, got {value!r}", path=path
        )
    return value
