"""What a model family has to say: its architecture in plain numbers, and its parameter mapping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn.functional import silu

from megatron_drpo.errors import ModelError
from megatron_drpo.hf_io import HfConfig
from megatron_drpo.models.mapping import ParameterMapping


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The mixture-of-experts layers."""

    num_experts: int
    num_experts_per_token: int
    ffn_hidden_size: int
    """Of one expert."""
    renormalise: bool
    """Weights of the chosen experts sum to 1."""
    is_moe_layer: tuple[bool, ...]
    """One per layer; the others are dense."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureConfig:
    """A decoder with RMSNorm, rotary embeddings, grouped-query attention and SwiGLU."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    """Of a dense layer."""
    norm_eps: float
    qk_norm: bool
    """RMSNorm over each query and key head."""
    rope_theta: float
    max_position_embeddings: int
    vocab_size: int
    """Without padding."""
    tie_word_embeddings: bool
    moe: MoeConfig | None = None

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and self.moe.is_moe_layer[layer]

    def transformer_config_fields(self) -> dict[str, Any]:
        """Keyword arguments for Megatron's TransformerConfig, in its spelling.

        GPTModel takes the rest: vocabulary, positions, rotary base, tied embeddings.
        """
        fields: dict[str, Any] = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "ffn_hidden_size": self.ffn_hidden_size,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.norm_eps,
            "qk_layernorm": self.qk_norm,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "gated_linear_unit": True,
            "activation_func": silu,
        }
        if self.moe is None:
            return fields
        return fields | {
            "num_moe_experts": self.moe.num_experts,
            "moe_router_topk": self.moe.num_experts_per_token,
            "moe_ffn_hidden_size": self.moe.ffn_hidden_size,
            # Softmax over the chosen logits = softmax over all logits, renormalised over the chosen.
            "moe_router_pre_softmax": not self.moe.renormalise,
            # A list makes Megatron write per-layer checkpoint keys; one number keeps the layers stacked.
            "moe_layer_freq": 1 if all(self.moe.is_moe_layer) else [int(x) for x in self.moe.is_moe_layer],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """One HF `model_type`."""

    model_type: str
    architecture: Callable[[HfConfig], ArchitectureConfig]
    """config.json -> architecture; ModelError for a setting that is not supported."""
    mapping: Callable[[ArchitectureConfig], ParameterMapping]


def read_rope_theta(config: HfConfig) -> float:
    """Base of the rotary embedding; ModelError when positions are scaled.

    transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`.
    """
    if config.has("rope_scaling"):
        raise ModelError(f"{config.source}: 'rope_scaling' is not supported")
    if not config.has("rope_parameters"):
        return config.get("rope_theta", float)
    rope = config.section("rope_parameters")
    if rope.get("rope_type", str, "default") != "default":
        raise ModelError(f"{rope.source}: only rope_type 'default' is supported")
    return rope.get("rope_theta", float)


def refuse_unsupported(config: HfConfig, unsupported: tuple[str, ...]) -> None:
    """Raise ModelError for the first of these flags that is set."""
    for key in unsupported:
        if config.get(key, bool, False):
            raise ModelError(f"{config.source}: {key!r} = true is not supported")
    activation = config.get("hidden_act", str)
    if activation != "silu":
        raise ModelError(f"{config.source}: 'hidden_act' is {activation!r}, only 'silu' is supported")
