"""The README's examples, run as they stand."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def server(embedded_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The README's server, on a free port; gives its address."""
    found = re.search(r"`qwen-run (serve artifacts/tiny-qwen2-chat)`", README)
    assert found is not None
    words = shlex.split(found[1].replace("artifacts/tiny-qwen2-chat", str(embedded_bundle)))
    # The bundle of the tests lies in a folder of another name.
    options = ["--port", "0", "--served-model-name", "tiny-qwen2-chat"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "qwen_runtime", *words, *options], stdout=file, stderr=file
        )
    try:
        deadline = time.monotonic() + 60
        while (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield address.group()
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_readme_shows_streaming_a_service_chat_json_a_processor_and_a_client() -> None:
    assert len(BLOCKS) == 7


def test_readme_examples_print_what_they_say(
    embedded_bundle: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, object] = {}
    outputs = []
    for block in BLOCKS:
        code = block.replace("artifacts/tiny-qwen2-chat", str(embedded_bundle))
        code = code.replace("http://127.0.0.1:8000", server)
        exec(compile(code, "README.md", "exec"), scope)
        outputs.append(capsys.readouterr().out)
    answer, streamed, awaited, conversation, structured, without_four, served = outputs
    assert "# " + answer.strip() in BLOCKS[0]
    assert "# " + streamed in BLOCKS[1]
    assert awaited == streamed.replace("|", "")
    assert "Paris" in conversation
    assert set(json.loads(structured)) == {"answer", "certain"}
    assert "4" not in without_four
    assert "# " + served.strip() in BLOCKS[6]
    scope["client"].close()  # type: ignore[attr-defined]


def test_readme_links_lead_to_something() -> None:
    root = Path(__file__).parents[1]
    missing = [
        target
        for target in re.findall(r"\]\(([^)]+)\)", README)
        if not target.startswith("http")
        and not ((root / target).is_file() and (root / target).stat().st_size)
    ]
    assert missing == []
