"""What TensorRT's parser made of a graph, and whether that computes the same thing.

The parser drops what it does not support without an error: an attention whose lengths are
dropped attends to the wrong tokens. So nothing is built before the network has been looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qwen_export.errors import TargetError

__all__ = ["NetworkFacts", "inspect_network"]

_PAST, _PRESENT = "past_key_values.", "present."


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """What a network was found to hold."""

    num_attentions: int
    """Attention layers; every one has its mask and no causal rule of its own."""
    aliases: Mapping[str, str]
    """Cache output to the cache input it updates in place."""
    num_layers: Mapping[str, int]
    """TensorRT's layers by kind."""


def inspect_network(trt: Any, network: Any, *, num_hidden_layers: int) -> NetworkFacts:
    """Check that every attention has its mask, every cache is updated in place, every input used.

    Args:
        trt: The TensorRT module: ``tensorrt_rtx_bindings`` or ``tensorrt``.
        network: A parsed ``INetworkDefinition`` of it.
        num_hidden_layers: Attention layers the graph has.

    Returns:
        What was found.

    Raises:
        TargetError: Naming every attention, cache or input that is not as it must be.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    attentions = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    updates = [layer for layer in layers if layer.type == trt.LayerType.KV_CACHE_UPDATE]
    _require(
        len(attentions) == num_hidden_layers,
        f"the network must have one attention for each of {num_hidden_layers} layers, got "
        f"{len(attentions)}",
        [layer.name for layer in attentions],
    )
    problems = [problem for layer in attentions for problem in _attention_problems(trt, layer)]
    aliases: dict[str, str] = {}
    for layer in updates:
        problem = _update_problem(trt, layer, aliases)
        problems += [problem] if problem else []
    problems += _missing_updates(network, aliases)
    problems += [(name, "is an input that nothing reads") for name in _unused(network, layers)]
    _require(
        not problems,
        "the engine would give wrong numbers: "
        + "; ".join(f"{name} {what}" for name, what in problems[:3])
        + (f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""),
        [name for name, _ in problems],
    )
    _require(
        len(aliases) == 2 * num_hidden_layers,
        f"the network must update 2 caches in place for each of {num_hidden_layers} layers, got "
        f"{len(aliases)}",
        list(aliases),
    )
    kinds = Counter(str(layer.type).rpartition(".")[2] for layer in layers)
    return NetworkFacts(len(attentions), aliases, dict(sorted(kinds.items())))


def _require(holds: bool, message: str, names: list[str]) -> None:
    if not holds:
        raise TargetError(message, names=names)


def _attention_problems(trt: Any, layer: Any) -> Iterator[tuple[str, str]]:
    # The network hands out base layers; the bindings give no other way to the attention's own.
    layer.__class__ = trt.IAttentionInputLayer
    attention = layer.attention
    if attention.mask is None:
        yield attention.name, "is an attention without its mask"
    if attention.causal_kind != trt.CausalMaskKind.NONE:
        yield attention.name, f"is an attention with a causal rule, {attention.causal_kind.name}"


def _update_problem(trt: Any, layer: Any, aliases: dict[str, str]) -> tuple[str, str] | None:
    """What is wrong with a cache update; records the pair of names when nothing is."""
    layer.__class__ = trt.IKVCacheUpdateLayer
    cache, updated = layer.get_input(0), layer.get_output(0)
    if not cache.is_network_input:
        return layer.name, f"updates {cache.name}, which is not an input of the network"
    if not updated.is_network_output:
        return layer.name, f"writes {updated.name}, which is not an output of the network"
    if updated.name.removeprefix(_PRESENT) != cache.name.removeprefix(_PAST):
        return layer.name, f"updates {cache.name} and calls it {updated.name}"
    if layer.cache_mode != trt.KVCacheMode.LINEAR:
        return layer.name, f"updates {cache.name} in mode {layer.cache_mode.name}, not LINEAR"
    aliases[updated.name] = cache.name
    return None


def _missing_updates(network: Any, aliases: Mapping[str, str]) -> list[tuple[str, str]]:
    """Cache outputs that no update writes."""
    names = [network.get_output(index).name for index in range(network.num_outputs)]
    return [
        (name, "is a cache that is not updated in place")
        for name in names
        if name.startswith(_PRESENT) and name not in aliases
    ]


def _unused(network: Any, layers: list[Any]) -> list[str]:
    read = {
        tensor.name
        for layer in layers
        for tensor in (layer.get_input(index) for index in range(layer.num_inputs))
        if tensor is not None
    }
    names = [network.get_input(index).name for index in range(network.num_inputs)]
    return [name for name in names if name not in read]
