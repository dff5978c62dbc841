"""Generation settings as command-line options, under transformers' names and in groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["GroupedCommand", "generation_options", "settings_from"]

Command = TypeVar("Command", bound=Callable[..., Any])


class GroupedOption(click.Option):
    """An option that is listed under a heading of its own in the help."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists grouped options group by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write options without a group first, then every group in the order of declaration."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


_GROUPS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "Length and time": [
        ("--max-new-tokens", {"type": int, "help": "Tokens to generate at most.  [default: 256]"}),
        ("--min-new-tokens", {"type": int, "help": "No end token before so many."}),
        ("--max-length", {"type": int, "help": "Prompt and generated tokens at most."}),
        ("--max-time", {"type": float, "help": "Seconds after which to stop."}),
    ],
    "Choosing tokens": [
        ("--greedy", {"is_flag": True, "help": "Most likely tokens (do_sample=False)."}),
        ("--sample", {"is_flag": True, "help": "Draw tokens (do_sample=True)."}),
        ("--temperature", {"type": float, "help": "Divides the scores, > 0."}),
        ("--top-k", {"type": int, "help": "Keep the k most likely tokens; 0 is off."}),
        ("--top-p", {"type": float, "help": "Keep the most likely tokens of this mass."}),
        ("--min-p", {"type": float, "help": "Keep tokens this fraction as likely as the best."}),
        ("--seed", {"type": int, "help": "Makes sampling reproducible."}),
        ("--rng", {"type": click.Choice(["default", "torch"]), "help": "Whose random numbers."}),
        ("--num-return-sequences", {"type": int, "help": "Outputs per prompt."}),
    ],
    "Penalties": [
        ("--repetition-penalty", {"type": float, "help": "On tokens seen; 1.0 is off."}),
        ("--presence-penalty", {"type": float, "help": "On tokens generated, once."}),
        ("--frequency-penalty", {"type": float, "help": "On tokens generated, each time."}),
        ("--no-repeat-ngram-size", {"type": int, "help": "No n-gram of this size twice."}),
    ],
    "Stopping": [
        ("--stop", {"multiple": True, "help": "Stop before this text; repeatable."}),
        ("--stop-strings", {"multiple": True, "help": "Stop after this text; repeatable."}),
        ("--eos-token-id", {"type": int, "multiple": True, "help": "End token; repeatable."}),
    ],
    "Beams and speculation": [
        ("--num-beams", {"type": int, "help": "Beams of a beam search; 1 is none."}),
        ("--length-penalty", {"type": float, "help": "Exponent of the length in a beam's score."}),
        ("--prompt-lookup-num-tokens", {"type": int, "help": "Draft from the prompt's n-grams."}),
        (
            "--assistant",
            {"type": click.Path(path_type=Path), "help": "Bundle of a smaller model that drafts."},
        ),
    ],
    "Structured output": [
        (
            "--json-schema",
            {
                "type": click.File("r"),
                "help": "File with a JSON Schema for the answer; - is stdin.",
            },
        ),
        ("--regex", {"help": "Regular expression that the answer matches."}),
        ("--choice", {"multiple": True, "help": "The answer is one of these; repeatable."}),
    ],
    "Output": [
        (
            "--logprobs",
            {"is_flag": True, "help": "Log-probabilities of the tokens (with --json)."},
        ),
        ("--top-logprobs", {"type": int, "help": "And of so many alternatives."}),
        (
            "--set",
            {
                "multiple": True,
                "metavar": "NAME=JSON",
                "help": "Any other setting of GenerationConfig; repeatable.",
            },
        ),
    ],
}

_PYTHON_ONLY = {"output_scores", "output_logits", "return_dict_in_generate"}
_NOT_SETTINGS = {"greedy", "sample", "assistant", "json_schema", "regex", "choice", "set"}
DEFAULT_NEW_TOKENS = 256
"""Tokens, where the command line names no limit."""


def generation_options(*, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Add the options, all but those named, to a command of class `GroupedCommand`."""
    options = [
        click.option(name, cls=GroupedOption, group=group, **kwargs)
        for group, members in _GROUPS.items()
        for name, kwargs in members
        if name not in without
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def settings_from(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `LLM.generate` for the options that were given.

    Raises:
        click.UsageError: If options exclude each other or cannot be read.
    """
    greedy, sample = options["greedy"], options["sample"]
    if greedy and sample:
        raise click.UsageError("--greedy and --sample exclude each other")
    settings: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if name not in _NOT_SETTINGS and value is not None and value is not False and value != ()
    }
    if greedy or sample:
        settings["do_sample"] = sample
    if "logprobs" not in settings and "top_logprobs" in settings:
        settings["logprobs"] = True
    response_format = _response_format(options)
    if response_format is not None:
        settings["response_format"] = response_format
    for assignment in options["set"]:
        name, equals, value = assignment.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError as error:
            raise click.UsageError(
                f'--set must be NAME=JSON (text in quotes: name="text"), got {assignment}'
            ) from error
        if not equals:
            raise click.UsageError(f"--set must be NAME=JSON, got {assignment}")
        if name in _PYTHON_ONLY:
            raise click.UsageError(f"{name} are arrays [rows, vocab]; ask for them in Python")
    return settings


def _response_format(options: Mapping[str, Any]) -> dict[str, Any] | None:
    given = [name for name in ("json_schema", "regex", "choice") if options[name]]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise click.UsageError(f"{names} exclude each other")
    if options["json_schema"]:
        try:
            schema = json.load(options["json_schema"])
        except ValueError as error:
            raise click.UsageError(f"--json-schema must be a JSON document: {error}") from error
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if options["regex"]:
        return {"type": "regex", "pattern": options["regex"]}
    if options["choice"]:
        return {"type": "choice", "choices": list(options["choice"])}
    return None
