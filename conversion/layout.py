"""Where a Megatron matrix lies in a checkpoint: stacked keys, or one key per layer.

A homogeneous model's layers share a key and a tensor [L, ...]: `decoder.layers.mlp.linear_fc2.weight`. With
`moe_layer_freq` given as a list, or `non_homogeneous_layers`, every layer has a key of its own:
`decoder.layers.3.mlp.linear_fc2.weight`. Experts are stacked in both. Either way Megatron's loader wants
exactly the key and shape that its model asks for (megatron/core/transformer/transformer_block.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple

from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.mapping import LAYER_PREFIX, MegatronName

EXTRA_STATE = "._extra_state"


class KeyLayout(StrEnum):
    """How layers appear in the keys."""

    stacked = "stacked"
    per_layer = "per-layer"


class Place(NamedTuple):
    """One matrix within the checkpoint's tensor `key`, whose shape is `leading_shape` + the matrix's."""

    key: str
    leading_shape: tuple[int, ...]
    """Layers and experts."""
    leading_offset: tuple[int, ...]


def default_layout(arch: ArchitectureConfig) -> KeyLayout:
    """What Megatron uses for this model by itself: stacked, unless dense and MoE layers are mixed."""
    is_mixed = arch.moe is not None and not all(arch.moe.is_moe_layer)
    return KeyLayout.per_layer if is_mixed else KeyLayout.stacked


def place_of(name: MegatronName, arch: ArchitectureConfig, layout: KeyLayout) -> Place:
    """The place of a matrix (or vector) of this model."""
    key, shape, offset = name.key, (), ()
    if name.layer is not None and layout is KeyLayout.per_layer:
        key = f"{LAYER_PREFIX}{name.layer}.{key.removeprefix(LAYER_PREFIX)}"
    elif name.layer is not None:
        shape, offset = (arch.num_layers,), (name.layer,)
    if name.expert is not None:
        assert arch.moe is not None
        shape, offset = (*shape, arch.moe.num_experts), (*offset, name.expert)
    return Place(key, shape, offset)


def object_key(place: Place) -> str:
    """DCP's name of an object that Megatron shards like this (ShardedObject.unique_key)."""
    shape, offset = place.leading_shape or (1,), place.leading_offset or (0,)
    return f"{place.key}/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"


def extra_state_keys(arch: ArchitectureConfig, layout: KeyLayout) -> Iterator[str]:
    """Objects in which Transformer Engine keeps FP8 scales; a model asks for them even where they are empty.

    All modules that have one under Transformer Engine's or megatron-core's own layers: a model takes those
    that it knows.
    """
    names = [MegatronName("decoder.final_layernorm"), MegatronName("output_layer")]
    attention = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
    for layer in range(arch.num_layers):
        modules = [f"self_attention.{module}" for module in attention]
        if arch.is_moe_layer(layer):
            assert arch.moe is not None
            modules += ["pre_mlp_layernorm"]
            names += [
                MegatronName(f"{LAYER_PREFIX}mlp.experts.experts.{module}", layer, expert)
                for expert in range(arch.moe.num_experts)
                for module in ("linear_fc1", "linear_fc2")
            ]
        else:
            modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
        names += [MegatronName(LAYER_PREFIX + module, layer) for module in modules]
    for name in names:
        place = place_of(name, arch, layout)
        yield object_key(place._replace(key=place.key + EXTRA_STATE))
