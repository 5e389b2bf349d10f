"""Qwen3 mixture of experts (HF model_type `qwen3_moe`), e.g. Qwen3-30B-A3B.

https://huggingface.co/docs/transformers/model_doc/qwen3_moe. Attention, embedding and dense layers are
those of `qwen3`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_drpo.errors import ModelError
from megatron_drpo.models import decoder, qwen3
from megatron_drpo.models.base import ArchitectureConfig, ModelFamily, MoeConfig
from megatron_drpo.weights.hf_folder import HfConfig
from megatron_drpo.weights.mapping import MegatronName, ParameterMapping, TensorMap, direct, gate_up


def architecture(config: HfConfig) -> ArchitectureConfig:
    """config.json of a Qwen3-MoE -> its numbers; ModelError names what is missing or not supported."""
    dense = qwen3.architecture(config)
    # transformers 5 writes `num_local_experts` for what earlier versions call `num_experts`.
    experts_key = "num_local_experts" if config.has("num_local_experts") else "num_experts"
    dense_layers = config.get_ints("mlp_only_layers")
    step = config.get("decoder_sparse_step", int, 1)
    moe = MoeConfig(
        num_experts=config.get(experts_key, int),
        num_experts_per_token=config.get("num_experts_per_tok", int),
        ffn_hidden_size=config.get("moe_intermediate_size", int),
        renormalise=config.get("norm_topk_prob", bool, False),
        is_moe_layer=tuple(
            layer not in dense_layers and (layer + 1) % step == 0 for layer in range(dense.num_layers)
        ),
    )
    if moe.num_experts_per_token == 1 and moe.renormalise:
        # The one weight would always be 1; Megatron refuses a softmax over one logit.
        raise ModelError(
            f"{config.source}: num_experts_per_tok = 1 with norm_topk_prob = true is not supported"
        )
    return replace(dense, moe=moe)


def mapping(arch: ArchitectureConfig) -> ParameterMapping:
    """The parameter mapping of a Qwen3-MoE."""

    def mlp(arch: ArchitectureConfig, layer: int) -> Iterator[TensorMap]:
        return moe_mlp(arch, layer) if arch.is_moe_layer(layer) else decoder.dense_mlp(arch, layer)

    return decoder.mapping(arch, mlp)


def moe_mlp(arch: ArchitectureConfig, layer: int) -> Iterator[TensorMap]:
    """Norm, router [E, H] and experts of one layer."""
    assert arch.moe is not None
    hf = f"model.layers.{layer}."
    hidden, ffn = arch.hidden_size, arch.moe.ffn_hidden_size

    def name(suffix: str, expert: int | None = None) -> MegatronName:
        return MegatronName(f"decoder.layers.{suffix}", layer, expert)

    yield direct(name("pre_mlp_layernorm.weight"), f"{hf}post_attention_layernorm.weight", (hidden,))
    yield direct(name("mlp.router.weight"), f"{hf}mlp.gate.weight", (arch.moe.num_experts, hidden))
    for expert in range(arch.moe.num_experts):
        projection = f"{hf}mlp.experts.{expert}."
        yield gate_up(
            name("mlp.experts.experts.linear_fc1.weight", expert),
            f"{projection}gate_proj.weight",
            f"{projection}up_proj.weight",
            (ffn, hidden),
        )
        yield direct(
            name("mlp.experts.experts.linear_fc2.weight", expert),
            f"{projection}down_proj.weight",
            (hidden, ffn),
        )


FAMILY = ModelFamily(model_type="qwen3_moe", architecture=architecture, mapping=mapping)
