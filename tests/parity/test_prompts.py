"""Prompts of every kind a bundle allows, within its context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_export.parity.prompts import make_prompts
from qwen_runtime.bundle import Bundle


def test_bundle_with_tokenizer_and_template_gets_every_kind(embedded_bundle: Path) -> None:
    chosen = make_prompts(Bundle.open(embedded_bundle))
    by_name = {prompt.name: prompt for prompt in chosen.prompts}
    assert {prompt.kind for prompt in chosen.prompts} == {
        "short", "single", "long", "unicode", "chat", "random", "left-padded",
    }  # fmt: skip
    assert len(by_name["single token"].tokens) == 1
    assert 300 <= len(by_name["long"].tokens) <= 512
    assert {prompt.steps for prompt in chosen.prompts} == {64}
    assert len({len(chosen.prompts[i].tokens) for i in chosen.left_padded}) == 3
    text = by_name["unicode"].text or ""
    assert "北京" in text
    assert "\u0301" in text
    assert "👩\u200d👩\u200d👧" in text
    assert by_name["chat"].text is not None
    assert "<|im_start|>assistant" in by_name["chat"].text
    assert chosen.notes == ()


def test_bundle_without_tokenizer_gets_seeded_ids_and_says_so(
    golden_bundle: Callable[[str], Path],
) -> None:
    bundle = Bundle.open(golden_bundle("qwen2_untied"))
    chosen, again = make_prompts(bundle), make_prompts(bundle)
    assert {prompt.kind for prompt in chosen.prompts} == {
        "short", "single", "long", "random", "left-padded",
    }  # fmt: skip
    assert all(prompt.text is None for prompt in chosen.prompts)
    assert [p.tokens.tolist() for p in chosen.prompts] == [
        p.tokens.tolist() for p in again.prompts
    ]
    assert "no tokenizer" in chosen.notes[0]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 64, 100, 2048])
def test_prompt_and_answer_fit_the_context(embedded_bundle: Path, limit: int) -> None:
    bundle = Bundle.open(embedded_bundle)
    small = Bundle(bundle.path, replace(bundle.manifest, max_context=limit))
    for prompt in make_prompts(small).prompts:
        assert len(prompt.tokens) >= 1
        assert prompt.steps == min(64, limit - len(prompt.tokens))
        assert prompt.steps >= min(64, limit // 2)


def test_ids_outside_the_model_are_left_out(embedded_bundle: Path) -> None:
    bundle = Bundle.open(embedded_bundle)
    model = replace(bundle.manifest.model, vocab_size=300)
    small = Bundle(bundle.path, replace(bundle.manifest, model=model))
    assert all(prompt.tokens.max() < 300 for prompt in make_prompts(small).prompts)


def test_template_that_refuses_every_message_is_noted(
    embedded_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(embedded_bundle)
    (tmp_path / "tokenizer.json").symlink_to(embedded_bundle / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no chat today') }}")
    chosen = make_prompts(Bundle(tmp_path, bundle.manifest))
    assert not [prompt for prompt in chosen.prompts if prompt.kind == "chat"]
    assert "no chat today" in chosen.notes[0]
