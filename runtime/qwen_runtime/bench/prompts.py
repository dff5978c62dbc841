"""Random prompts that can be drawn again."""

from __future__ import annotations

import numpy as np

from qwen_runtime.backends.base import IntArray
from qwen_runtime.errors import CapacityError
from qwen_runtime.llm import LLM

__all__ = ["random_prompts"]


def random_prompts(llm: LLM, seed: tuple[int, ...], rows: int, length: int) -> IntArray:
    """Draw ordinary tokens: no special tokens, none that the model's padded vocabulary lacks.

    Args:
        llm: Whose vocabulary they come from.
        seed: Equal seeds give equal prompts.
        rows: Prompts.
        length: Tokens of each.

    Returns:
        Token ids, [rows, length].

    Raises:
        CapacityError: If there is no memory for so many.
    """
    num_tokens, special = llm.bundle.manifest.model.vocab_size, set[int]()
    if llm.tokenizer is not None:
        num_tokens = min(num_tokens, llm.tokenizer.vocab_size)
        special |= llm.tokenizer.special_ids
    settings = llm.generation_config
    for named in (settings.bos_token_id, settings.pad_token_id, settings.eos_token_id):
        special |= {named} if isinstance(named, int) else set(named or ())
    ordinary = np.setdiff1d(np.arange(num_tokens), np.array(sorted(special), np.int64))
    try:
        return np.random.default_rng(seed).choice(ordinary, (rows, length)).astype(np.int64)
    except (MemoryError, ValueError) as error:  # ValueError: more than can be addressed
        raise CapacityError(
            f"batch must be a number of rows that there is memory for, got {rows} of {length} "
            "tokens; ask for fewer",
            param="batch",
        ) from error
