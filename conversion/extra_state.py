"""Names of the objects in which Transformer Engine keeps FP8 scales.

A model asks its checkpoint for them even where they are empty.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.weights.mapping import LAYER_PREFIX, MegatronName
from megatron_drpo.weights.torch_dist_keys import Place, Places

_SUFFIX = "._extra_state"
_ATTENTION = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")


def extra_state_keys(arch: ArchitectureConfig, places: Places) -> Iterator[str]:
    """Of all modules that have one under Transformer Engine's or megatron-core's own layers.

    A model takes those that it knows.
    """
    names = [MegatronName("decoder.final_layernorm"), MegatronName("output_layer")]
    for layer in range(arch.num_layers):
        modules = [f"self_attention.{module}" for module in _ATTENTION]
        if arch.is_moe_layer(layer):
            assert arch.moe is not None
            modules.append("pre_mlp_layernorm")
            names += [
                MegatronName(f"{LAYER_PREFIX}mlp.experts.experts.{module}", layer, expert)
                for expert in range(arch.moe.num_experts)
                for module in ("linear_fc1", "linear_fc2")
            ]
        else:
            modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
        names += [MegatronName(LAYER_PREFIX + module, layer) for module in modules]
    for name in names:
        place = places[name]
        yield _object_key(place._replace(key=place.key + _SUFFIX))


def _object_key(place: Place) -> str:
    """DCP's name of an object that Megatron shards like this (its ShardedObject.unique_key)."""
    shape, offset = place.leading_shape or (1,), place.leading_offset or (0,)
    return f"{place.key}/shard_{'.'.join(map(str, offset))}_{'.'.join(map(str, shape))}"
