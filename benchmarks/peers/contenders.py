"""Who is compared with whom, and the settings that each peer may choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["GROUPS", "REFERENCE", "Contender"]

_LLAMA = [{"flash_attention": f, "repack": r} for f in (True, False) for r in (True, False)]
_GENAI: list[dict[str, Any]] = [{"chunk_size": None}, {"chunk_size": 512}]


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """One way to run the model."""

    name: str
    kind: str
    """Of the module `runner_KIND`."""
    model: str
    """Name of its model in the workshop."""
    variants: tuple[dict[str, Any], ...] = ({},)
    """Settings to choose from."""
    is_peer: bool = True
    """Whether it runs in the peers' environment."""


def _ours(precision: str) -> Contender:
    return Contender(f"ours {precision}", "ours", f"ours-{precision}", is_peer=False)


def _llama(ftype: str) -> Contender:
    name = f"llama.cpp {ftype}"
    return Contender(name, "llamacpp", f"{ftype.lower()}.gguf", tuple(_LLAMA))


def _genai(precision: str) -> Contender:
    return Contender(f"genai {precision}", "genai", f"genai-{precision}", tuple(_GENAI))


def _transformers(name: str, dtype: str) -> Contender:
    variants = tuple({"dtype": dtype, "attention": kind} for kind in ("sdpa", "eager"))
    return Contender(f"transformers {name}", "transformers", "checkpoint", variants, is_peer=False)


REFERENCE = _ours("fp32")
"""Whose logits the others must resemble."""

GROUPS = {
    "int4": (_genai("int4"), _ours("int4"), _genai("int4-128"), _llama("Q4_0")),
    "int8": (_llama("Q8_0"), _ours("int8"), _transformers("bf16", "bfloat16")),
    "fp32": (_genai("fp32"), REFERENCE, _transformers("fp32", "float32")),
}
"""Measured in turn; neighbours are compared."""
