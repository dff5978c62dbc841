"""The README's examples, run as they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_shows_streaming_chat_json_and_a_custom_processor() -> None:
    assert len(BLOCKS) == 5


def test_readme_examples_print_what_they_say(
    embedded_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, object] = {}
    outputs = []
    for block in BLOCKS:
        code = block.replace("artifacts/tiny-qwen2-chat", str(embedded_bundle))
        exec(compile(code, "README.md", "exec"), scope)
        outputs.append(capsys.readouterr().out)
    answer, streamed, conversation, structured, without_four = outputs
    assert "# " + answer.strip() in BLOCKS[0]
    assert "# " + streamed in BLOCKS[1]
    assert "Paris" in conversation
    assert set(json.loads(structured)) == {"answer", "certain"}
    assert "4" not in without_four


def test_readme_links_lead_to_something() -> None:
    root = Path(__file__).parents[1]
    missing = [
        target
        for target in re.findall(r"\]\(([^)]+)\)", README)
        if not target.startswith("http")
        and not ((root / target).is_file() and (root / target).stat().st_size)
    ]
    assert missing == []
