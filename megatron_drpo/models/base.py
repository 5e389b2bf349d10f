"""What a model family has to say: its architecture in plain numbers, and its parameter mapping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn.functional import silu

from megatron_drpo.weights.hf_folder import HfConfig
from megatron_drpo.weights.mapping import ParameterMapping


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
    qkv_bias: bool = False
    """A bias on queries, keys and values; nothing else has one."""
    rope_theta: float
    rope_scaling_factor: float | None = None
    """Of Llama 3.1, whose low rotary frequencies are divided by it; None: no scaling."""
    max_position_embeddings: int
    vocab_size: int
    """Without padding."""
    tie_word_embeddings: bool
    moe: MoeConfig | None = None

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and self.moe.is_moe_layer[layer]

    def transformer_config_fields(self) -> dict[str, Any]:
        """Keyword arguments for Megatron's TransformerConfig, in its spelling.

        GPTModel takes the rest: vocabulary, positions, rotary base and scaling, tied embeddings.
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
            "add_qkv_bias": self.qkv_bias,
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
