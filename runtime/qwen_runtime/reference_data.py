"""reference.npz: what the original model answered, kept with the bundle.

Rows are prompts followed by greedy tokens. For every row the original's best logits are stored
at the last prompt token and after each greedy token, which is what prefill and decode return.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qwen_runtime.backends.base import FloatArray, IntArray
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import BundleError

__all__ = ["REFERENCE_FILE", "ReferenceData", "ReferenceRow"]

REFERENCE_FILE = "reference.npz"
_ARRAYS: dict[str, tuple[str, int]] = {
    "names": ("U", 1),
    "prompt_lengths": ("i", 1),
    "prompt_tokens": ("i", 1),
    "step_counts": ("i", 1),
    "step_tokens": ("i", 1),
    "top_tokens": ("i", 2),
    "top_logits": ("f", 2),
    "scales": ("f", 1),
}
"""Array name to kind of element ("U" text, "i" integer, "f" float) and number of axes."""


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """One prompt and what the original model answered."""

    name: str
    prompt: IntArray
    """Token ids, [P]."""
    steps: IntArray
    """The greedy tokens that follow it, [S]; S may be 0."""
    top_tokens: IntArray
    """The original's best tokens after P, P + 1, ... P + S tokens, best first, [S + 1, k]."""
    top_logits: FloatArray
    """Their logits, [S + 1, k]."""
    scales: FloatArray
    """max|logit| over the whole vocabulary, [S + 1]."""


@dataclass(frozen=True, slots=True)
class ReferenceData:
    """All rows of a reference.npz."""

    rows: tuple[ReferenceRow, ...]

    def write(self, path: Path) -> None:
        """Write the file."""
        rows = self.rows
        np.savez_compressed(
            path,
            names=np.array([row.name for row in rows], np.str_),
            prompt_lengths=np.array([len(row.prompt) for row in rows], np.int64),
            prompt_tokens=np.concatenate([row.prompt for row in rows]),
            step_counts=np.array([len(row.steps) for row in rows], np.int64),
            step_tokens=np.concatenate([row.steps for row in rows]),
            top_tokens=np.concatenate([row.top_tokens for row in rows]).astype(np.int32),
            top_logits=np.concatenate([row.top_logits for row in rows]).astype(np.float32),
            scales=np.concatenate([row.scales for row in rows]).astype(np.float32),
        )

    @classmethod
    def read(cls, bundle: Bundle) -> ReferenceData:
        """Read a bundle's file.

        Raises:
            BundleError: If the bundle has none (it was not verified when it was built), or it is
                damaged or does not fit the bundle.
        """
        if REFERENCE_FILE not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.path} has no {REFERENCE_FILE} to check against, because it was built "
                "with --no-verify; run `qwen-export verify` on it, or build it again without "
                "--no-verify",
                path=bundle.path / REFERENCE_FILE,
            )
        path = bundle.file(REFERENCE_FILE)
        arrays = _load(path)
        try:
            data = cls(tuple(_rows(arrays)))
        except (ValueError, IndexError) as error:
            raise _damaged(path, str(error)) from error
        _check_fit(data, bundle, path)
        return data


def _load(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise _damaged(path, str(error)) from error
    for name, (kind, axes) in _ARRAYS.items():
        array = arrays[name]
        if array.dtype.kind != kind or array.ndim != axes:
            raise _damaged(path, f"{name} is {array.dtype} with {array.ndim} axes")
    return arrays


def _rows(arrays: dict[str, npt.NDArray[np.generic]]) -> list[ReferenceRow]:
    rows = {len(arrays[name]) for name in ("names", "prompt_lengths", "step_counts")}
    if len(rows) != 1:
        raise ValueError(f"names, prompt_lengths and step_counts have {sorted(rows)} entries")
    prompts = _split(arrays["prompt_tokens"], arrays["prompt_lengths"])
    steps = _split(arrays["step_tokens"], arrays["step_counts"])
    counts = arrays["step_counts"].astype(np.int64) + 1
    tokens = _split(arrays["top_tokens"], counts)
    logits = _split(arrays["top_logits"], counts)
    scales = _split(arrays["scales"], counts)
    if tokens and arrays["top_tokens"].shape != arrays["top_logits"].shape:
        raise ValueError("top_tokens and top_logits differ in shape")
    columns = (arrays["names"], prompts, steps, tokens, logits, scales)
    return [
        ReferenceRow(
            str(name),
            prompt.astype(np.int64),
            step.astype(np.int64),
            top.astype(np.int64),
            value.astype(np.float32),
            scale.astype(np.float32),
        )
        for name, prompt, step, top, value, scale in zip(*columns, strict=True)
    ]


def _split(
    flat: npt.NDArray[np.generic], counts: npt.NDArray[np.generic]
) -> list[npt.NDArray[np.generic]]:
    sizes = counts.astype(np.int64)
    if (sizes < 0).any() or sizes.sum() != len(flat):
        raise ValueError(f"the row lengths add up to {sizes.sum()}, but there are {len(flat)}")
    return np.split(flat, np.cumsum(sizes)[:-1])


def _check_fit(data: ReferenceData, bundle: Bundle, path: Path) -> None:
    vocab_size, limit = bundle.manifest.model.vocab_size, bundle.manifest.max_context
    if not data.rows:
        raise _damaged(path, "it holds no prompt")
    for row in data.rows:
        if not 1 <= len(row.prompt) <= limit - len(row.steps):
            raise _damaged(path, f"{row.name} does not fit max_context {limit}")
        if row.top_tokens.shape[1] < 1:
            raise _damaged(path, f"{row.name} has no logits")
        for ids in (row.prompt, row.steps, row.top_tokens):
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise _damaged(path, f"{row.name} holds a token outside the vocabulary")


def _damaged(path: Path, reason: str) -> BundleError:
    return BundleError(f"{path} is damaged: {reason}; build the bundle again", path=path)
