"""The examples of docs/structured-output.md run as they stand, in order; its table is the code's."""

import re
from pathlib import Path

from qwen_runtime.structured import json_schema

DOCUMENT = Path(__file__).parents[3] / "docs" / "structured-output.md"


def test_the_examples_run(embedded_bundle, monkeypatch, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 4
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "tiny-qwen2-chat").symlink_to(embedded_bundle)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)


def test_the_table_of_keywords_is_what_the_code_knows():
    rows = re.findall(
        r"^\| ?(enforced|without effect|) ?\| (`.*) \|$", DOCUMENT.read_text("utf-8"), re.M
    )
    listed = [re.findall(r"`([^`]+)`", text) for _, text in rows]
    without_effect = set(listed[-1])
    assert [name for name, _ in rows][-1] == "without effect"
    assert without_effect == json_schema._ANNOTATIONS
    assert {name for names in listed[:-1] for name in names} == (
        json_schema._KNOWN - json_schema._ANNOTATIONS
    )
