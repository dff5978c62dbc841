"""What a caller may pass as a prompt, turned into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.text import ChatTemplate, Tokenizer
from qwen_runtime.text.template_data import plain_data

__all__ = ["Message", "PromptReader"]

Message = Mapping[str, Any]
"""A chat message: at least "role", usually "content"."""


class PromptReader:
    """Tells text, ids, messages and lists of them apart.

    Args:
        tokenizer: None for a bundle of token ids.
        chat_template: None for a bundle without one.
    """

    def __init__(self, tokenizer: Tokenizer | None, chat_template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    def read(
        self, prompt: Any, *, tools: Sequence[Any] | None, template_kwargs: Mapping[str, Any]
    ) -> tuple[list[list[int]], bool]:
        """Turn a prompt or a list of prompts into ids.

        Args:
            prompt: Text, ids, messages, or a list of these.
            tools: For the chat template.
            template_kwargs: For the chat template.

        Returns:
            Ids of every prompt, and whether a list of prompts was given.

        Raises:
            RequestError: If it is none of these, or the bundle lacks what it needs.
        """
        if prompt is None:
            return [], False
        if self._is_one(prompt):
            return [self._ids(prompt, tools, template_kwargs)], False
        if not isinstance(prompt, (list, tuple)):
            raise RequestError(
                "a prompt must be text, token ids, messages or a list of these, got "
                f"{type(prompt).__name__}",
                param="prompt",
            )
        if not prompt:
            raise RequestError("the prompt must not be an empty list", param="prompt")
        for item in prompt:
            if not self._is_one(item):
                raise RequestError(
                    "a list of prompts must hold texts, lists of token ids or lists of messages, "
                    f"got {item!r:.80}",
                    param="prompt",
                )
        return [self._ids(item, tools, template_kwargs) for item in prompt], True

    @staticmethod
    def _is_one(prompt: Any) -> bool:
        if isinstance(prompt, str):
            return True
        if isinstance(prompt, np.ndarray):
            return prompt.ndim == 1
        if not isinstance(prompt, (list, tuple)) or not prompt:
            return False
        first = prompt[0]
        is_id = isinstance(first, (int, np.integer)) and not isinstance(first, bool)
        return is_id or isinstance(first, Mapping)

    def _ids(
        self, prompt: Any, tools: Sequence[Any] | None, template_kwargs: Mapping[str, Any]
    ) -> list[int]:
        messages = not isinstance(prompt, (str, np.ndarray)) and isinstance(prompt[0], Mapping)
        if messages:
            return self._encode(self.render(prompt, tools, template_kwargs))
        self.refuse_template_arguments(type(prompt).__name__, tools, template_kwargs)
        if isinstance(prompt, str):
            return self._encode(prompt)
        return prompt.tolist() if isinstance(prompt, np.ndarray) else list(prompt)

    @staticmethod
    def refuse_template_arguments(
        prompt: str, tools: Sequence[Any] | None, template_kwargs: Mapping[str, Any] | None
    ) -> None:
        """Refuse what only a chat template could use.

        Args:
            prompt: What the prompt is instead of messages.
            tools: As given.
            template_kwargs: As given.

        Raises:
            RequestError: If one of them was given.
        """
        for name, value in (("tools", tools), ("chat_template_kwargs", template_kwargs or None)):
            if value is not None:
                raise RequestError(
                    f"{name} only works with messages, got {prompt}; pass "
                    '[{"role": "user", "content": ...}]',
                    param=name,
                )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text a chat template makes of messages, ready for an answer.

        Raises:
            RequestError: If the bundle has no template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise RequestError(
                "messages need a chat template, but this bundle has none; pass text or token ids",
                param="prompt",
            )
        for index, message in enumerate(messages):
            # A template would see a placeholder such as "<bytes>", and answer it.
            plain_data(message, refuse_in=f"message {index}")
        extra = {"add_generation_prompt": True} | dict(template_kwargs or {})
        if extra.get("continue_final_message"):
            extra["add_generation_prompt"] = False
        return self._chat_template.render(messages, tools=tools, **extra)

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise RequestError(
                "text needs a tokenizer, but this bundle has none; pass token ids",
                param="prompt",
            )
        ids = self._tokenizer.encode(text)
        if not ids:
            raise RequestError(
                "the prompt must have at least one token, got an empty text", param="prompt"
            )
        return ids
