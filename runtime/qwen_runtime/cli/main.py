"""The group of ``qwen-run``'s commands. Heavy imports wait until a command runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen_runtime.cli.bench import bench
from qwen_runtime.cli.options import (
    DEFAULT_NEW_TOKENS,
    GroupedCommand,
    generation_options,
    settings_from,
)
from qwen_runtime.cli.serve import serve
from qwen_runtime.cli.support import CONTEXT, json_option, print_json, reports
from qwen_runtime.errors import QwenRuntimeError

if TYPE_CHECKING:
    from qwen_runtime.llm import LLM
    from qwen_runtime.outputs import RequestOutput

__all__ = ["main"]

_NOT_FOR_CHAT = (
    "--num-beams",
    "--length-penalty",
    "--num-return-sequences",
    "--logprobs",
    "--top-logprobs",
)
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads; one per core by default."
)


@click.group(context_settings=CONTEXT)
@click.version_option(metadata.version("qwen-export"), prog_name="qwen-run")
@click.option("--traceback", is_flag=True, help="Show the whole traceback of an error.")
def main(traceback: bool) -> None:
    """Run bundles made by qwen-export: no torch, no transformers.

    \b
    Examples:
      qwen-run generate artifacts/tiny-qwen2-chat "What is 17 + 25?" --greedy
      qwen-run chat artifacts/tiny-qwen2-chat
    """


@main.command(cls=GroupedCommand)
@bundle_argument
@click.argument("prompt", nargs=-1)
@generation_options()
@click.option("--raw", is_flag=True, help="Take PROMPT as it is, without the chat template.")
@click.option("--system", metavar="TEXT", help="System message before PROMPT.")
@threads_option
@json_option
@reports(QwenRuntimeError)
def generate(
    bundle: Path,
    prompt: tuple[str, ...],
    raw: bool,
    system: str | None,
    threads: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate an answer to every PROMPT.

    "-", or no PROMPT at all, reads one from standard input. A PROMPT is a user message if the
    bundle has a chat template, unless --raw is given. Settings that are
    not given come from the bundle's generation_config.json.

    \b
    Examples:
      qwen-run generate BUNDLE "What is 17 + 25?" --greedy
      qwen-run generate BUNDLE "Once upon a time" --raw --max-new-tokens 50 --seed 1 --json
    """
    settings = settings_from(options)
    if settings.get("logprobs") and not as_json:
        raise click.UsageError("--logprobs and --top-logprobs are printed with --json")
    texts = _texts(prompt)
    with ExitStack() as stack:
        llm = stack.enter_context(_open(bundle, threads))
        if options["assistant"] is not None:
            settings["assistant_model"] = stack.enter_context(_open(options["assistant"], threads))
        chat = llm.chat_template is not None and not raw
        if system is not None and not chat:
            raise click.UsageError("--system needs a chat template: the bundle has none, or --raw")
        prompts = [_messages(text, system) if chat else text for text in texts]
        _limit_length(llm, prompts, settings)
        single = all(settings.get(name, 1) == 1 for name in ("num_return_sequences", "num_beams"))
        if len(prompts) == 1 and single and not as_json:
            for piece in llm.stream(prompts[0], **settings):
                click.echo(piece, nl=False)
            click.echo()
            return
        outputs = llm.generate(prompts, **settings)
    if as_json:
        print_json([_document(output) for output in outputs])
    else:
        click.echo("\n---\n".join(output.text for output in outputs))


@main.command()
@bundle_argument
@json_option
@reports(QwenRuntimeError)
def check(bundle: Path, as_json: bool) -> None:
    """Prove again that BUNDLE answers like its checkpoint.

    Compares every file's sha256, then replays the reference stored in the bundle on this machine.
    No PyTorch is needed.

    \b
    Example:
      qwen-run check artifacts/tiny-qwen2-chat
    """
    from qwen_runtime.bundle import Bundle
    from qwen_runtime.check import check as run_check
    from qwen_runtime.cli.bars import Bars

    with Bars() as bars:
        result = run_check(Bundle.open(bundle), progress=bars)
    if as_json:
        print_json({"passed": result.passed, "max_error": result.max_error, **asdict(result)})
    elif result.passed:
        click.echo(
            f"{bundle} answers like its checkpoint: {result.num_files} files unchanged, "
            f"{result.prompts} prompts replayed, max logit error {result.max_error:.1e} "
            f"(tolerance {result.tolerance:.0e})"
        )
        if result.served is not None:
            click.echo(
                f"as served, with int8 activations: max logit error {result.served.max_error:.1e} "
                f"(tolerance {result.served.tolerance:.1e})"
            )
    else:
        click.echo(f"{bundle} does not answer like its checkpoint: {result.problem}")
    if not result.passed:
        raise click.exceptions.Exit(1)


@main.command(cls=GroupedCommand)
@bundle_argument
@generation_options(without=_NOT_FOR_CHAT)
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
@threads_option
@reports(QwenRuntimeError)
def chat(bundle: Path, system: str | None, threads: int | None, **options: Any) -> None:
    """Talk to BUNDLE in the terminal.

    Ctrl-C stops an answer; /reset starts over; /quit or Ctrl-D leaves.

    \b
    Example:
      qwen-run chat artifacts/tiny-qwen2-chat --temperature 0.7
    """
    from qwen_runtime.cli.chat import converse

    settings = settings_from(options)
    with ExitStack() as stack:
        llm = stack.enter_context(_open(bundle, threads))
        if options["assistant"] is not None:
            settings["assistant_model"] = stack.enter_context(_open(options["assistant"], threads))
        if llm.chat_template is None:
            raise click.ClickException(f"{bundle} has no chat template; use `qwen-run generate`")
        converse(llm, system, settings | _default_limit(llm, settings))


main.add_command(bench)
main.add_command(serve)


def _open(bundle: Path, threads: int | None) -> LLM:
    from qwen_runtime.llm import LLM

    return LLM(bundle, threads=threads)


def _limit_length(llm: LLM, prompts: list[Any], settings: dict[str, Any]) -> None:
    """Where neither the user nor the bundle sets a limit, take ours, or what the context leaves."""
    if not _default_limit(llm, settings):
        return
    room = llm.bundle.manifest.max_context + 1 - max(len(llm.encode(p)) for p in prompts)
    settings["max_new_tokens"] = max(1, min(DEFAULT_NEW_TOKENS, room))


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": text}]


def _default_limit(llm: LLM, settings: Mapping[str, Any]) -> dict[str, int]:
    """Our limit of new tokens, unless the user or the bundle sets one."""
    names = ("max_new_tokens", "max_length")
    if any(name in settings or getattr(llm.generation_config, name) is not None for name in names):
        return {}
    return {"max_new_tokens": DEFAULT_NEW_TOKENS}


def _texts(prompts: tuple[str, ...]) -> list[str]:
    """The prompts, one of them read from standard input where "-" stands."""
    prompts = prompts or ("-",)
    if prompts.count("-") > 1:
        raise click.UsageError('standard input is read once: give "-" one time')
    texts = [_stdin() if text == "-" else text for text in prompts]
    if not all(texts):
        raise click.UsageError("PROMPT must not be empty")
    return texts


def _stdin() -> str:
    if sys.stdin.isatty():
        click.echo("Reading the prompt from standard input; end it with Ctrl-D.", err=True)
    return sys.stdin.read().removesuffix("\n")


def _document(output: RequestOutput) -> dict[str, object]:
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
        "sequence_score": output.sequence_score,
        "assistance": output.assistance and asdict(output.assistance),
        "logprobs": output.logprobs
        and [
            {"token_id": item.token_id, "logprob": item.logprob, "top": item.top}
            for item in output.logprobs
        ],
    }
