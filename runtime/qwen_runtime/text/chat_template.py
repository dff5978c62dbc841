"""Messages to the text of a prompt, through the template of the checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_runtime.errors import RequestError
from qwen_runtime.text.template_data import REASONING_KEYS, plain_data, prepare_messages
from qwen_runtime.text.tool_schema import tool_schema

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["ChatTemplate"]

_FINAL_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks where the last message ends in the rendered text. The blank at its end tells whether
the template strips the message."""

_NOT_TEMPLATE_ARGUMENTS = frozenset(
    {
        "chat_template",
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
"""Arguments of transformers' ``apply_chat_template`` that no template reads."""


class ChatTemplate:
    """The chat template of a bundle, or several by name.

    Templates are compiled when they are first used, and may be rendered by any number of
    threads at once.

    Args:
        templates: The Jinja text, or texts by name: "tool_use" serves requests with tools if
            it is there, "default" all others.
        special_tokens: Named special tokens that are set; templates read them as variables.

    Raises:
        RequestError: From ``render``, about everything that is wrong with a request.

    Source:
        ``PreTrainedTokenizerBase.apply_chat_template`` of transformers 5.23.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        named = {"default": templates} if isinstance(templates, str) else dict(templates)
        self.templates: dict[str, str] = named
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self._compiled: dict[str, Template] = {}
        self._lock = threading.Lock()

    def render(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> str:
        """Write a conversation as the model was trained to read it.

        Args:
            messages: Dicts with "role" and "content", and whatever else the template reads.
            tools: JSON schemas, or Python functions whose type hints and Google docstring
                describe them.
            documents: Dicts with "title" and "text", for templates that read them.
            add_generation_prompt: End with the beginning of an assistant's message.
            continue_final_message: Leave the last message open, so that the model goes on with
                it; a string names another key than "content" to go on with.
            **kwargs: Variables for the template, such as ``enable_thinking=False``; they win
                over special tokens.

        Returns:
            The prompt's text. Encode it without adding special tokens.

        Raises:
            RequestError: If an argument is wrong, or the template fails or refuses.
        """
        _check_keywords(kwargs)
        prepared = prepare_messages(messages)
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt are not compatible: the first "
                "goes on with the last message, the second begins a new one; pass one of them",
                param="continue_final_message",
            )
        name = self._choose(tools)
        final_text = None
        if continue_final_message:
            key = continue_final_message if isinstance(continue_final_message, str) else "content"
            final_text = _tag_final_message(prepared[-1], key, self.templates[name])
        variables = {
            **self.special_tokens,
            **plain_data(kwargs),
            "messages": prepared,
            "tools": None if tools is None else [_plain_tool(tool) for tool in _listed(tools)],
            "documents": _plain_documents(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        rendered = self._render(name, variables)
        return rendered if final_text is None else _cut_at_tag(rendered, final_text)

    def _choose(self, tools: object) -> str:
        if tools is not None and "tool_use" in self.templates:
            return "tool_use"
        if "default" in self.templates:
            return "default"
        raise RequestError(
            "a bundle with several chat templates must have one named 'default', got "
            f"{sorted(self.templates)}; name one of them so",
            param="messages",
        )

    def _render(self, name: str, variables: Mapping[str, Any]) -> str:
        try:
            return self._template(name).render(variables)
        except Exception as error:  # a template can raise whatever Python can
            raise RequestError(_explain(error), param="messages") from error

    def _template(self, name: str) -> Template:
        with self._lock:
            template = self._compiled.get(name)
            if template is None:
                # Imported late: Jinja costs 60 ms that text prompts need not pay.
                from qwen_runtime.text.template_environment import compile_template

                template = self._compiled[name] = compile_template(self.templates[name])
            return template


def _explain(error: Exception) -> str:
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    reason = str(error) or type(error).__name__
    if isinstance(error, TemplateSyntaxError):
        return (
            f"the chat template must be valid Jinja, but line {error.lineno} has an error: "
            f"{error.message}; correct chat_template.jinja in the checkpoint and build again"
        )
    if isinstance(error, SecurityError):
        return f"the chat template did what its sandbox forbids: {reason}"
    if type(error) is TemplateError:  # what raise_exception raises
        return f"the chat template refuses the messages: {reason}"
    return (
        f"the chat template failed on the messages ({type(error).__name__}): {reason}; "
        "pass messages in the form the model's card shows"
    )


def _check_keywords(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name in _NOT_TEMPLATE_ARGUMENTS:
            raise RequestError(
                f"render takes variables of the template beside its own arguments, and {name} is "
                "neither: it only returns text; leave it out",
                param=name,
            )


def _listed(tools: Any) -> Sequence[Any]:
    if not isinstance(tools, (list, tuple)):
        raise RequestError(
            f"tools must be a list of JSON schemas or functions, got {type(tools).__name__}; "
            "put a single tool in a list",
            param="tools",
        )
    return tools


def _plain_tool(tool: Any) -> Any:
    return plain_data(tool if isinstance(tool, Mapping) else tool_schema(tool))


def _plain_documents(documents: Any) -> list[Any] | None:
    if documents is None:
        return None
    if not isinstance(documents, (list, tuple)) or not all(
        isinstance(document, Mapping) for document in documents
    ):
        raise RequestError(
            "documents must be a list of dicts with 'title' and 'text', got "
            f"{documents!r}; pass [{{'title': ..., 'text': ...}}]",
            param="documents",
        )
    return [plain_data(document) for document in documents]


def _tag_final_message(message: dict[str, Any], key: str, template: str) -> str:
    """Append the tag to the text that is to be continued, in place, and return that text."""
    final = message.get(key)
    if final is None:
        raise _cannot_continue(f"the last message has no {key!r}")
    keys = [key]
    if key in REASONING_KEYS:  # every copy is tagged, whichever of them the template reads
        keys = [name for name in REASONING_KEYS if message.get(name) == final]
    if not any(name in template for name in keys):
        raise _cannot_continue(f"the chat template does not read {key!r}")
    if isinstance(final, str):
        message.update(dict.fromkeys(keys, final + _FINAL_TAG))
        return final
    if isinstance(final, (list, tuple)):
        for block in reversed(final):
            if isinstance(block, dict) and isinstance(block.get("text"), str):
                text: str = block["text"]
                block["text"] = text + _FINAL_TAG
                return text
    raise _cannot_continue(f"there is no text in the {key!r} of the last message")


def _cut_at_tag(rendered: str, final_text: str) -> str:
    bare_tag = _FINAL_TAG.strip()
    if final_text.strip() not in rendered or bare_tag not in rendered:
        raise _cannot_continue("the chat template does not show the whole of the last message")
    end = rendered.rindex(bare_tag)
    if rendered.startswith(_FINAL_TAG, end):
        return rendered[:end]
    return rendered[:end].rstrip()  # the template strips the message


def _cannot_continue(reason: str) -> RequestError:
    return RequestError(
        f"continue_final_message needs a last message to go on with, but {reason}; "
        "end messages with the text to continue",
        param="continue_final_message",
    )
