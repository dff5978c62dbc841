"""The bundle's tokenizer: text to token ids and back, and the raw bytes of each token."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders

from qwen_runtime.errors import BundleError, RequestError

__all__ = ["Tokenizer"]

_MAX_TOKEN_ID = 2**32 - 1
"""Ids are unsigned 32-bit numbers in the ``tokenizers`` library."""

_LONG_TEXT = 16_384
"""Characters from which encoding takes so long, about 10 ms, that other threads must not wait."""


def _byte_alphabet() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to the byte it stands for.

    Source:
        GPT-2's byte-level BPE: bytes that print as one Latin-1 character stand for themselves,
        the others follow in order from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(rest)})
    return alphabet


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A byte-level BPE tokenizer read from ``tokenizer.json``.

    Instances hold no state that a call changes, so any number of threads may share one.

    Args:
        path: The ``tokenizer.json`` file. Padding and truncation set in it are switched off.
        special_tokens: Named special tokens that are set, such as
            ``{"eos_token": "<|im_end|>"}``. Each becomes special if the file does not say so,
            as in transformers.
        split_special_tokens: Encode the text of special tokens as ordinary text, so that a
            user cannot write one.

    Raises:
        BundleError: If the file is missing or damaged, does not decode bytes (``ByteLevel``),
            or lacks a named special token.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        split_special_tokens: bool = False,
    ) -> None:
        self.path = Path(path)
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self._backend = _read(self.path)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._mark_special_tokens()
        self._backend.encode_special_tokens = split_special_tokens
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        # Filled as ids are seen: a vocabulary of 150,000 tokens would cost a start-up 0.2 s.
        self._bytes: dict[int, bytes] = {}

    def _mark_special_tokens(self) -> None:
        known = {
            token.content
            for token in self._backend.get_added_tokens_decoder().values()
            if token.special
        }
        for name, content in self.special_tokens.items():
            if self._backend.token_to_id(content) is None:
                raise BundleError(
                    f"{self.path}: every special token must be in the vocabulary, but {name} "
                    f"{content!r} is not; build the bundle again from its checkpoint",
                    path=self.path,
                )
            if content not in known:
                self._backend.add_special_tokens([content])

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out of decoded text."""
        return self._special_ids

    @property
    def has_every_byte(self) -> bool:
        """Whether each of the 256 bytes is a token, so that tokens can spell any text."""
        return all(self._backend.token_to_id(character) is not None for character in _BYTE_OF)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, or None if there is none."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, adding none of its own (no bos, no eos).

        Args:
            text: Any valid Unicode text; special tokens written in it become their ids unless
                ``split_special_tokens`` was set.

        Raises:
            RequestError: If ``text`` is no string, or holds half of a surrogate pair.
        """
        _check_text(text)
        if len(text) < _LONG_TEXT:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        # Only batches are encoded without Python's lock: other threads go on meanwhile.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts at once, in parallel where the machine allows it.

        Raises:
            RequestError: If an element is no string, or holds half of a surrogate pair.
        """
        for text in texts:
            _check_text(text)
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Turn token ids into text.

        Args:
            ids: Token ids; those outside the tokenizer decode to nothing.
            skip_special_tokens: Leave special tokens out.

        Returns:
            The text; bytes that are no UTF-8 become U+FFFD.
        """
        known = [token_id for token_id in map(int, ids) if 0 <= token_id <= _MAX_TOKEN_ID]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for, which need not be whole characters.

        Args:
            token_id: Any id.

        Returns:
            The raw bytes of an ordinary token, the UTF-8 text of an added one, ``b""`` for an
            id outside the tokenizer. Decoding ids equals decoding their joined bytes.
        """
        raw = self._bytes.get(token_id)
        if raw is None:
            known = 0 <= token_id <= _MAX_TOKEN_ID
            token = self._backend.id_to_token(token_id) if known else None
            raw = b"" if token is None else _token_to_bytes(token)
            if token is not None:  # ids without end must not fill the memory
                self._bytes[token_id] = raw
        return raw

    def vocabulary_bytes(self) -> dict[int, bytes]:
        """Return the bytes of every token by its id."""
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return {token_id: _token_to_bytes(token) for token, token_id in vocabulary.items()}


def _read(path: Path) -> BackendTokenizer:
    if not path.is_file():
        raise BundleError(
            f"{path}: the tokenizer file is missing; copy the whole bundle again", path=path
        )
    try:
        backend = BackendTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BundleError(
            f"{path}: must be a readable tokenizer.json, but {error}; copy the whole bundle again",
            path=path,
        ) from error
    if not isinstance(backend.decoder, decoders.ByteLevel):
        kind = "none" if backend.decoder is None else type(backend.decoder).__name__
        raise BundleError(
            f"{path}: the decoder must be ByteLevel, as in every Qwen tokenizer, got {kind}; "
            "use the tokenizer of a Qwen checkpoint",
            path=path,
        )
    return backend


def _token_to_bytes(token: str) -> bytes:
    # The ByteLevel decoder's own rule: one character out of the alphabet makes a token literal.
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(
            f"text must be a string, got {type(text).__name__}; "
            "pass token ids as a list of integers instead",
            param="text",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"text must be valid Unicode, but character {error.start} is half of a surrogate "
            f"pair ({text[error.start]!r}); decode the input with errors='replace'",
            param="text",
        ) from error
