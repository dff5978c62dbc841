"""What the models are asked: one prompt of every kind that has broken an export before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qwen_runtime.backends.base import IntArray
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import RequestError
from qwen_runtime.text import ChatTemplate, Tokenizer

__all__ = ["MAX_STEPS", "Prompt", "PromptSet", "make_prompts"]

MAX_STEPS = 64
"""Greedy tokens after a prompt, where the context leaves room for them."""
LONG_TOKENS = 460
"""Tokens of the long prompt: with its answer it crosses a step of the cache's growth (512)."""
BEYOND_TOKENS = 16
"""By which a prompt exceeds a sliding window that the other prompts do not fill."""
SEED = 20240607

Kind = Literal["short", "single", "long", "unicode", "chat", "random", "left-padded"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of token ids."""

    name: str
    kind: Kind
    tokens: IntArray
    """[P], P >= 1."""
    steps: int
    """Greedy tokens to generate after it: min(64, limit - P)."""
    text: str | None
    """What was encoded; None for prompts made of ids."""


@dataclass(frozen=True, slots=True)
class PromptSet:
    """All prompts of a verification."""

    prompts: tuple[Prompt, ...]
    left_padded: tuple[int, ...]
    """Indices of the rows the reference runs as one left-padded batch."""
    notes: tuple[str, ...]
    """Kinds that this bundle does not allow, and why."""


_SHORT = "What is 17 + 25?"
_UNICODE = (
    "北京和東京 — 안녕하세요! naïve cafe\u0301 a\u0308o\u0323\u0302, क्षत्रिय, שָׁלוֹם,"
    " 👩\u200d👩\u200d👧 🇫🇷 ✅ x²≤√2\t\u00a0end"
)
_PADDED = ("Hi", "Name three colours of the rainbow.", "The sum of two and three is")
_CHAT = (
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Say hello, then count from one to five."},
)
_PASSAGE = (
    "On day {day} the ship's log reads: wind from the north-west at {wind} knots, {sail} sails "
    "set, {distance} miles made good since noon. The cook counted {apple} apples and the mate "
    "wrote (in pencil): keep her head up, and wake me at {hour}:30.\n"
)


def make_prompts(bundle: Bundle, window: int | None = None) -> PromptSet:
    """Make the prompts a bundle can be asked.

    Args:
        bundle: Gives the tokenizer, the chat template, the vocabulary and the context.
        window: Tokens a sliding layer sees; some prompt exceeds it where the context allows.

    Returns:
        Prompts whose lengths leave room for their answers in the bundle's context. A bundle
        without a tokenizer gets seeded random ids of the same lengths.
    """
    manifest = bundle.manifest
    limit, vocab_size = manifest.max_context, manifest.model.vocab_size
    rng = np.random.default_rng(SEED)
    sizes: dict[str, tuple[Kind, int]] = {
        "single token": ("single", 1),
        "short": ("short", 7),
        "long": ("long", LONG_TOKENS),
        "random ids": ("random", 24),
    }
    padded = {f"left-padded row {i + 1}": n for i, n in enumerate((2, 11, 5))}
    sizes |= {name: ("left-padded", n) for name, n in padded.items()}
    # Drawn for every name, whether used or not: one prompt's ids do not move with another's.
    rows: dict[str, tuple[Kind, list[int], str | None]] = {
        name: (kind, rng.integers(0, vocab_size, n).tolist(), None)
        for name, (kind, n) in sizes.items()
    }
    notes: list[str] = []
    if manifest.tokenizer is None:
        notes.append("no tokenizer: prompts are seeded random ids; Unicode and chat are left out")
    else:
        rows |= _text_rows(bundle, notes)
    prompts = [
        _fit(name, kind, ids, text, limit, vocab_size)
        for name, (kind, ids, text) in rows.items()
        if any(0 <= token < vocab_size for token in ids)
    ]
    if window is not None and all(len(prompt.tokens) <= window for prompt in prompts):
        if window < limit:
            length = min(window + BEYOND_TOKENS, limit - 1)
            beyond = rng.integers(0, vocab_size, length)
            steps = min(MAX_STEPS, limit - length)
            prompts.append(Prompt("beyond the window", "long", beyond, steps, None))
        else:
            notes.append(f"no row exceeds the sliding window of {window} tokens")
    left_padded = tuple(i for i, prompt in enumerate(prompts) if prompt.kind == "left-padded")
    return PromptSet(tuple(prompts), left_padded, tuple(notes))


def _text_rows(bundle: Bundle, notes: list[str]) -> dict[str, tuple[Kind, list[int], str | None]]:
    entry = bundle.manifest.tokenizer
    if entry is None:
        raise AssertionError("only called with a tokenizer")
    tokenizer = Tokenizer(
        bundle.file("tokenizer.json"),
        entry.special_tokens,
        split_special_tokens=entry.split_special_tokens,
    )
    texts: dict[str, tuple[Kind, str]] = {
        "short": ("short", _SHORT),
        "long": ("long", _long_text(tokenizer)),
        "unicode": ("unicode", _UNICODE),
        **{f"left-padded row {i + 1}": ("left-padded", text) for i, text in enumerate(_PADDED)},
    }
    if not entry.chat_templates:
        notes.append("no chat template: the chat prompt is left out")
    else:
        chat = _chat_text(bundle, notes)
        if chat is not None:
            texts["chat"] = ("chat", chat)
    rows: dict[str, tuple[Kind, list[int], str | None]] = {
        name: (kind, tokenizer.encode(text), text) for name, (kind, text) in texts.items()
    }
    first = tokenizer.encode("Hello")[:1]
    rows["single token"] = ("single", first, tokenizer.decode(first))
    return rows


def _long_text(tokenizer: Tokenizer) -> str:
    text, day = "", 0
    while len(tokenizer.encode(text)) < LONG_TOKENS:
        day += 1
        text += _PASSAGE.format(
            day=day,
            wind=5 + 7 * day % 23,
            sail=("two", "three", "all")[day % 3],
            distance=40 + 37 * day % 61,
            apple=90 - 4 * day,
            hour=1 + 5 * day % 11,
        )
    return text


def _chat_text(bundle: Bundle, notes: list[str]) -> str | None:
    entry = bundle.manifest.tokenizer
    if entry is None:
        raise AssertionError("only called with a tokenizer")
    sources = {
        name: bundle.file(file).read_text("utf-8") for name, file in entry.chat_templates.items()
    }
    template = ChatTemplate(sources, entry.special_tokens)
    reason = ""
    # Some templates know no system role.
    for messages in (_CHAT, _CHAT[1:]):
        try:
            return template.render(messages, add_generation_prompt=True)
        except RequestError as error:
            reason = str(error)
    notes.append(f"the chat prompt is left out: {reason}")
    return None


def _fit(
    name: str, kind: Kind, ids: list[int], text: str | None, limit: int, vocab_size: int
) -> Prompt:
    """Cut a prompt so that half the context, or 64 tokens of it, are left for the answer."""
    room = max(1, limit - min(MAX_STEPS, limit // 2))
    # A tokenizer may know added tokens that the model has no row for.
    known = [token for token in ids if 0 <= token < vocab_size]
    # The end of a chat holds the beginning of the answer; elsewhere the beginning counts.
    most = min(room, LONG_TOKENS)
    cut = known[-most:] if kind == "chat" else known[:most]
    return Prompt(name, kind, np.array(cut, np.int64), min(MAX_STEPS, limit - len(cut)), text)
