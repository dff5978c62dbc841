"""What every command shares: how errors, warnings and results reach the user.

Results go to stdout; progress, warnings and errors to stderr. Exit status: 0 done, 1 could not
do it, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import click

__all__ = ["CONTEXT", "json_option", "print_json", "reports"]

P = ParamSpec("P")
R = TypeVar("R")

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document to stdout."
)


def print_json(document: object) -> None:
    """Print a result for machines."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def reports(
    *known: type[Exception], extra: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Turn known errors into one ``Error:`` line and exit status 1; show warnings as lines.

    Args:
        *known: Exceptions that are the user's to mend. Others are bugs and keep their traceback.
        extra: Optional dependencies that the command needs, for the message when one is missing.
    """

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @wraps(command)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            context = click.get_current_context()
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                try:
                    return command(*args, **kwargs)
                except known as error:
                    if context.find_root().params.get("traceback"):
                        raise
                    raise click.ClickException(str(error)) from error
                except ModuleNotFoundError as error:
                    if extra is None or (error.name or "").startswith("qwen_"):
                        raise
                    raise click.ClickException(
                        f"{error.name} is not installed; this command needs "
                        f"pip install 'qwen-export[{extra}]'"
                    ) from error
                except KeyboardInterrupt:
                    raise click.Abort from None

        return wrapper

    return decorate


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"Warning: {message}", err=True)
    sys.stderr.flush()
