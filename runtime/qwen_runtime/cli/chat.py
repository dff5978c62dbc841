"""The conversation of ``qwen-run chat``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from qwen_runtime.errors import RequestError
from qwen_runtime.llm import LLM

__all__ = ["converse"]


def converse(llm: LLM, system: str | None, settings: Mapping[str, Any]) -> None:
    """Read messages from the terminal and stream answers until /quit or end of input."""
    head = [] if system is None else [{"role": "system", "content": system}]
    messages = list(head)
    click.echo("Ctrl-C stops an answer, /reset starts over, /quit leaves.", err=True)
    while True:
        try:
            text = click.prompt("you", prompt_suffix="> ", err=True).strip()
        except click.Abort:
            click.echo(err=True)
            return
        if text == "/quit":
            return
        if text == "/reset":
            messages = list(head)
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = _answer(llm, messages, settings)
        except RequestError as error:
            # The conversation may have outgrown the context: say so and let the user go on.
            click.echo(f"Error: {error}", err=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(llm: LLM, messages: list[dict[str, str]], settings: Mapping[str, Any]) -> str:
    answer = ""
    try:
        with llm.stream(messages, **settings) as stream:
            for piece in stream:
                answer += piece
                click.echo(piece, nl=False)
    except KeyboardInterrupt:
        click.echo(" [stopped]", nl=False, err=True)
    click.echo()
    return answer
