"""Building a complete tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from qwen_export.checkpoint.json_file import read_json_object, read_text
from qwen_export.checkpoint.special_tokens import SpecialTokens
from qwen_export.errors import CheckpointError, UnsupportedModelError

__all__ = ["build_tokenizer_json"]

# Qwen's split into words: contractions, words, single digits, punctuation, line ends, blanks.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer_json(
    folder: Path, settings: Mapping[str, Any], special: SpecialTokens, *, qwen_class: bool
) -> str:
    """Build the tokenizer of a checkpoint and write it as one JSON text.

    Args:
        folder: The checkpoint; has tokenizer.json, or vocab.json and merges.txt.
        settings: Its tokenizer_config.json, or an empty mapping.
        special: Its special and added tokens.
        qwen_class: True rebuilds Qwen's pipeline around the vocabulary, as transformers does for
            Qwen2Tokenizer; False keeps the pipeline of tokenizer.json.

    Returns:
        The text of a tokenizer.json without padding or truncation.

    Raises:
        CheckpointError: If a file is damaged, or an added token cannot have the id it claims.
        UnsupportedModelError: If tokenizer.json is not a BPE tokenizer.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        source = read_json_object(path)
        tokenizer = _from_json(source, path, settings) if qwen_class else _load(source, path)
    elif qwen_class:
        tokenizer = _from_vocabulary(folder, settings)
        path = folder / "vocab.json"
    else:
        raise UnsupportedModelError(
            f"{folder}: tokenizer_class {settings.get('tokenizer_class')!r} without a "
            "tokenizer.json is not supported; Qwen2Tokenizer is",
            key="tokenizer_class",
        )
    _add_tokens(tokenizer, special, qwen_class=qwen_class)
    _check_ids(tokenizer, special, path)
    if not (folder / "tokenizer.json").is_file():
        tokenizer.post_processor = _post_processor(tokenizer, settings, special)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return str(tokenizer.to_str())


def _from_json(source: dict[str, Any], path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    model = source.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise UnsupportedModelError(
            f"{path}: model type {kind!r} is not supported; a byte-level BPE is",
            key="model",
        )
    # Only these parts count; the rest of the pipeline is Qwen's.
    plain = {key: model.get(key) for key in ("vocab", "merges")}
    tokenizer = _load({**source, "added_tokens": [], "model": {"type": "BPE", **plain}}, path)
    _set_pipeline(tokenizer, settings)
    return tokenizer


def _load(source: dict[str, Any], path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(source))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{path} is not a valid tokenizer: {error}", path=path) from error


def _from_vocabulary(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    path = folder / "merges.txt"
    lines = read_text(path).split("\n")
    # Only the first line may be a comment: "#" also begins merges.
    body = lines[1:] if lines[0].startswith("#version") else lines
    merges = [line.rstrip("\r").split(" ") for line in body if line.strip()]
    for number, merge in enumerate(merges, 1 + len(lines) - len(body)):
        if len(merge) != 2:
            raise CheckpointError(
                f"{path}: line {number} must be two tokens with a blank between, got {merge!r}",
                path=path,
            )
    vocabulary = read_json_object(folder / "vocab.json")
    try:
        tokenizer = Tokenizer(
            BPE(vocab=vocabulary, merges=[(left, right) for left, right in merges])
        )
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(
            f"vocab.json and merges.txt of {folder} are not a valid tokenizer: {error}",
            path=path,
        ) from error
    _set_pipeline(tokenizer, settings)
    return tokenizer


def _set_pipeline(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    prefix_space = bool(settings.get("add_prefix_space"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _add_tokens(tokenizer: Tokenizer, special: SpecialTokens, *, qwen_class: bool) -> None:
    """Add tokens in transformers' order: it decides the ids and which flags win."""
    named = special.named()
    added = [special.added[token_id] for token_id in sorted(special.added)]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known.update(token.content for token in added)
    added += [token for token in named if token.content not in known]
    tokenizer.add_tokens(added)
    if qwen_class:
        tokenizer.add_tokens([AddedToken(token.content, special=True) for token in named])


def _check_ids(tokenizer: Tokenizer, special: SpecialTokens, path: Path) -> None:
    for token_id, token in special.added.items():
        actual = tokenizer.token_to_id(token.content)
        if actual != token_id:
            raise CheckpointError(
                f"{path}: the added token {token.content!r} claims id {token_id}, but the "
                f"vocabulary gives it {actual}; added tokens must continue the vocabulary",
                path=path,
            )


def _post_processor(
    tokenizer: Tokenizer, settings: Mapping[str, Any], special: SpecialTokens
) -> TemplateProcessing:
    """Without a tokenizer.json, add_bos_token and add_eos_token of the settings hold."""
    bos = special.roles.get("bos_token") if settings.get("add_bos_token") else None
    eos = special.roles.get("eos_token") if settings.get("add_eos_token") else None
    single = " ".join([*([bos.content] if bos else []), "$A", *([eos.content] if eos else [])])
    return TemplateProcessing(
        single=single,
        special_tokens=[
            (token.content, tokenizer.token_to_id(token.content)) for token in (bos, eos) if token
        ],
    )
