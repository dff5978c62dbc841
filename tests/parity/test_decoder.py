"""Rung 2: the module that is traced, in eager PyTorch, against transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from parity.golden_models import SUPPORTED

from qwen_export.checkpoint import Checkpoint
from qwen_export.model.decoder import Decoder, Step
from qwen_export.model.parameters import parameters
from qwen_export.rotary import rotary_tables

TOLERANCE = 2e-5
"""Of logits around 10, at two layers: fp32 rounding with room."""


def decoder_of(checkpoint: Checkpoint, max_context: int) -> Decoder:
    tied = checkpoint.resolve_tying().tied
    decoder = Decoder(checkpoint.config, tied=tied, max_context=max_context)
    state: dict[str, torch.Tensor] = {}
    cos, sin = rotary_tables(checkpoint.config, max_context)
    tables = {"model.rotary_emb.cos": cos, "model.rotary_emb.sin": sin}
    for parameter in parameters(checkpoint.config, tied=tied, max_context=max_context):
        name = parameter.name
        array = tables[name] if name in tables else checkpoint.read(name)
        tensor = torch.from_numpy(np.array(array, np.float32))
        state[name] = tensor.T.contiguous() if parameter.transposed else tensor
    decoder.load_state_dict(state, strict=True)
    return decoder.eval()


def empty_cache(checkpoint: Checkpoint, batch: int, capacity: int) -> Any:
    config = checkpoint.config
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]


def decoded(checkpoint: Checkpoint, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits of every position, the tokens given ``chunk`` at a time."""
    decoder = decoder_of(checkpoint, 64)
    cache, parts = empty_cache(checkpoint, len(ids), 32), []
    for start in range(0, ids.shape[1], chunk):
        past = torch.full((len(ids),), start)
        logits, cache = decoder(ids[:, start : start + chunk], past, None, cache)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("name", SUPPORTED)
@torch.no_grad()
def test_decoder_gives_the_logits_of_transformers(
    name: str,
    golden_checkpoint: Callable[[str], Checkpoint],
    full_model: Callable[[str], Any],
) -> None:
    ids = torch.arange(40).reshape(2, 20) * 3 + 1
    expected = full_model(name)(ids).logits
    checkpoint = golden_checkpoint(name)
    for chunk in (20, 7, 1):
        found = decoded(checkpoint, ids, chunk)
        assert (found - expected).abs().max() < TOLERANCE * expected.abs().max(), chunk


@torch.no_grad()
def test_decoder_with_wrong_rotary_tables_is_told_apart(
    golden_checkpoint: Callable[[str], Checkpoint],
    full_model: Callable[[str], Any],
) -> None:
    checkpoint = golden_checkpoint("qwen2_untied")
    ids = torch.arange(20)[None]
    expected = full_model("qwen2_untied")(ids).logits
    decoder = decoder_of(checkpoint, 64)
    decoder.model.rotary_emb.sin.neg_()
    cache = empty_cache(checkpoint, 1, 32)
    found, _ = decoder(ids, torch.tensor([0]), None, cache)
    assert (found - expected).abs().max() > 0.1 * expected.abs().max()


@torch.no_grad()
def test_one_layer_equals_transformers_layer(
    golden_checkpoint: Callable[[str], Checkpoint],
    full_model: Callable[[str], Any],
    forward: dict[str, np.ndarray[Any, Any]],
) -> None:
    for name in ("qwen2_untied", "qwen3_untied"):
        decoder = decoder_of(golden_checkpoint(name), 64)
        ids = torch.from_numpy(forward["ids1"])
        hidden = torch.from_numpy(forward[f"{name}_hidden"])
        cache = empty_cache(golden_checkpoint(name), 1, 32)
        step = Step(ids, torch.tensor([0]), cache, decoder.model.rotary_emb)
        found, _ = decoder.model.layers[0](hidden[0][None], cache[0], step)
        scale = hidden[1].abs().max()
        assert (found[0] - hidden[1]).abs().max() < TOLERANCE * scale
        assert (found[0] - hidden[0]).abs().max() > 0.01 * scale, "a layer that does nothing"
