"""`qwen-run` as users call it: results, exit codes, messages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qwen_runtime.cli import main


def run(*args: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)


def test_help_of_every_command_answers_without_importing_an_engine() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from qwen_runtime.cli import main;"
        "names = ['', *main.commands];"
        "outs = [CliRunner().invoke(main, [*filter(None, [n]), '--help']).output for n in names];"
        "assert all(o.startswith('Usage:') for o in outs), outs;"
        "assert not {'numpy', 'onnxruntime', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_answers_through_the_chat_template(embedded_bundle: Path) -> None:
    result = run("generate", embedded_bundle, "What is 17 + 25?", "--greedy")
    assert result.exit_code == 0, result.output
    assert result.stdout == "17 + 25 = 42\n"


def test_generate_raw_continues_the_text(embedded_bundle: Path) -> None:
    prompt = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
    result = run(
        "generate", embedded_bundle, "--raw", "--greedy", "--repetition-penalty", "1.0", prompt
    )
    assert result.stdout == "17 + 25 = 42\n"


def test_generate_reads_a_prompt_from_standard_input(embedded_bundle: Path) -> None:
    result = run("generate", embedded_bundle, "--greedy", stdin="What is 17 + 25?\n")
    assert result.stdout == "17 + 25 = 42\n"


def test_generate_json_gives_one_document_per_prompt(embedded_bundle: Path) -> None:
    result = run(
        "generate", embedded_bundle, "What is 2 + 3?", "What is 4 + 4?", "--greedy", "--json"
    )
    documents = json.loads(result.stdout)
    assert [document["text"] for document in documents] == ["2 + 3 = 5", "4 + 4 = 8"]
    assert {document["finish_reason"] for document in documents} == {"stop"}
    first, second = (document["num_cached_tokens"] for document in documents)
    assert first == 0 < second, "the beginning of both prompts is computed once"


def test_generate_with_a_seed_repeats_itself(embedded_bundle: Path) -> None:
    arguments = ("generate", embedded_bundle, "Tell me a story.", "--sample", "--seed", "7")
    assert run(*arguments).stdout == run(*arguments).stdout
    assert run(*arguments).stdout != run(*arguments[:-1], "8").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "0", "--sample"], 1, "temperature must be"),
        (["--temperature", "warm"], 2, "is not a valid float"),
        (["--greedy", "--sample"], 2, "--greedy and --sample exclude each other"),
        (["--max-new-tokens", "0"], 1, "max_new_tokens"),
        (["--beams", "2"], 2, "No such option"),
    ],
)
def test_wrong_settings_are_refused_with_the_name_of_the_option(
    embedded_bundle: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run("generate", embedded_bundle, "Hi", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_text_for_a_bundle_of_token_ids_is_refused(
    golden_bundle: Callable[[str], Path],
) -> None:
    result = run("generate", golden_bundle("qwen2_untied"), "Hi")
    assert result.exit_code == 1
    assert "tokenizer" in result.stderr


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    result = run("generate", tmp_path, "Hi")
    assert result.exit_code == 1
    assert "has no manifest.json; build one with `qwen-export build" in result.stderr


def test_check_of_a_bundle_that_was_never_verified_says_so(embedded_bundle: Path) -> None:
    result = run("check", embedded_bundle)
    assert result.exit_code == 1
    assert "reference.npz" in result.stderr


def test_check_passes_for_a_verified_bundle_and_shows_progress(verified_bundle: Path) -> None:
    result = run("check", verified_bundle)
    assert result.exit_code == 0, result.output
    assert "answers like its checkpoint" in result.stdout
    assert "Checking files" in result.stderr
    assert "Replaying on ONNX Runtime" in result.stderr


def test_check_names_a_changed_file(verified_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(verified_bundle, tmp_path / "bundle"))
    weights = bundle / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    result = run("check", bundle)
    assert result.exit_code == 1
    assert "weights.bin: sha256 must be" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "PROMPT must not be empty"),
        (["-", "-"], 'give "-" one time'),
        (["Hi", "--top-logprobs", "2"], "are printed with --json"),
        (["Hi", "--set", "output_scores=true"], "ask for them in Python"),
    ],
)
def test_what_the_command_line_cannot_do_is_wrong_usage(
    embedded_bundle: Path, arguments: list[str], message: str
) -> None:
    result = run("generate", embedded_bundle, *arguments, stdin="Hi")
    assert result.exit_code == 2
    assert message in result.stderr


def test_chat_answers_resets_and_leaves(embedded_bundle: Path) -> None:
    result = run(
        "chat",
        embedded_bundle,
        "--greedy",
        stdin="What is 17 + 25?\n/reset\nWhat is the capital of France?\n/quit\n",
    )
    assert result.exit_code == 0, result.output
    assert "17 + 25 = 42\n" in result.stdout
    assert "Paris" in result.stdout


def test_chat_ends_with_the_input(embedded_bundle: Path) -> None:
    result = run("chat", embedded_bundle, "--greedy", stdin="")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
