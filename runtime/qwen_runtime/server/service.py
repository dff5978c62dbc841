"""What the endpoints of one app share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_runtime.async_llm import AsyncLLM
from qwen_runtime.outputs import RequestOutput
from qwen_runtime.server.errors import ApiError
from qwen_runtime.server.lifecycle import Lifecycle
from qwen_runtime.server.metrics import Metrics
from qwen_runtime.text import Tokenizer

__all__ = ["Service", "usage"]


@dataclass(frozen=True, slots=True)
class Service:
    """A model under its name."""

    lifecycle: Lifecycle
    metrics: Metrics
    model_name: str
    fingerprint: str
    """Changes with the bundle."""
    created: int
    """When the bundle was built, seconds since 1970."""

    @property
    def llm(self) -> AsyncLLM:
        """The model.

        Raises:
            NotReadyError: If it is not loaded.
        """
        return self.lifecycle.llm

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; `create_app` refuses bundles without."""
        tokenizer = self.llm.llm.tokenizer
        assert tokenizer is not None
        return tokenizer

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together, at most: what the model and its cache can hold."""
        return min(self.llm.llm.max_context, self.llm.stats().cache_tokens_limit)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model knows."""
        return self.llm.llm.bundle.manifest.model.vocab_size

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer and are no part of its text."""
        ids = self.llm.llm.generation_config.eos_token_id
        return frozenset(() if ids is None else (ids,) if isinstance(ids, int) else ids)

    def check_model(self, name: str | None) -> None:
        """Refuse other models than the one that is served.

        Args:
            name: As a request names it; None is the one there is.

        Raises:
            ApiError: 404.
        """
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model must be {self.model_name!r}, the one that is served, got {name!r:.80}",
                "model",
                "model_not_found",
            )

    def encode(self, prompt: Any, **template: Any) -> list[int]:
        """Token ids of a prompt, by ``LLM.encode``.

        Args:
            prompt: Text, ids or messages.
            **template: What else the chat template reads.
        """
        return self.llm.llm.encode(prompt, **template)


def usage(outputs: Sequence[RequestOutput], choices_per_prompt: int) -> dict[str, Any]:
    """The object ``usage``: a prompt counts once, however many answers it has.

    Args:
        outputs: All answers, those of one prompt one after another.
        choices_per_prompt: Answers of each prompt.
    """
    prompts = outputs[::choices_per_prompt]
    num_prompt = sum(len(output.prompt_token_ids) for output in prompts)
    num_generated = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(output.num_cached_tokens for output in prompts)
        },
    }
