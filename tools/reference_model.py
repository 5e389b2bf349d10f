"""A Qwen3 or Qwen3-MoE in float64, one sequence at a time, in plain torch: what parity is measured against.

It shares nothing with the product but the reader of safetensors: no Megatron, no packing, no parallelism.

    L  tokens of the sequence      H  hidden size       V  vocabulary
    N  query heads                 G  key-value heads   D  size of a head
    E  experts                     K  experts of a token
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from megatron_drpo.weights.hf_folder import HfConfig, HfFolder


class ReferenceModel:
    """The weights of an HF folder and the function they define."""

    def __init__(self, path: str | Path) -> None:
        folder = HfFolder(path)
        config = folder.config
        self.parameters: dict[str, Tensor] = {
            name: folder.get(name).double().requires_grad_() for name in folder
        }
        """float64 leaves by HF name."""
        self.router_margin = math.inf
        """Smallest distance, over all calls so far, between the router's logits of the last expert that was
        chosen and the first that was not: how far a rounding error may go without changing the choice."""
        self._chosen: list[Tensor] = []
        self.num_layers = config.get("num_hidden_layers", int)
        self.num_heads = config.get("num_attention_heads", int)
        self.num_groups = config.get("num_key_value_heads", int)
        self.head_dim = config.get("head_dim", int)
        self.eps = config.get("rms_norm_eps", float)
        self.rope_theta = _rope_theta(config)
        self.is_tied = config.get("tie_word_embeddings", bool, False)
        self.moe_layers = _moe_layers(config)
        if self.moe_layers:
            self.num_experts_per_token = config.get("num_experts_per_tok", int)
            self.renormalise = config.get("norm_topk_prob", bool, False)

    def logits(self, token_ids_L: Tensor, routes: Tensor | None = None) -> Tensor:
        """[L, V]: row t predicts token t + 1.

        Args:
            routes: [L-1, M, K] experts to take instead of the most probable ones, of each token but the last
                in each of the M layers that have experts.
        """
        routes_of = {layer: index for index, layer in enumerate(sorted(self.moe_layers))}
        x_LH = self.parameters["model.embed_tokens.weight"][token_ids_L]
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            x_LH = x_LH + self._attention(self._norm(x_LH, f"{prefix}input_layernorm"), f"{prefix}self_attn.")
            y_LH = self._norm(x_LH, f"{prefix}post_attention_layernorm")
            if layer in self.moe_layers:
                forced = None if routes is None else routes[:, routes_of[layer]].long()
                x_LH = x_LH + self._experts(y_LH, f"{prefix}mlp.", forced)
            else:
                x_LH = x_LH + self._swiglu(y_LH, f"{prefix}mlp.")
        head = "model.embed_tokens" if self.is_tied else "lm_head"
        return self._linear(self._norm(x_LH, "model.norm"), head)

    @torch.no_grad()
    def choices(self, token_ids_L: Tensor) -> Tensor:
        """[L, M, K]: the experts that each token goes to by itself."""
        self._chosen = []
        self.logits(token_ids_L)
        return torch.stack(self._chosen, 1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.parameters[f"{name}.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """x / rms(x) * weight over the last dimension."""
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.parameters[f"{name}.weight"]

    def _attention(self, x_LH: Tensor, prefix: str) -> Tensor:
        """Causal; queries and keys are normalised per head, then rotated; N / G queries share a key head."""
        length = len(x_LH)
        q_LND = self._linear(x_LH, f"{prefix}q_proj").view(length, self.num_heads, self.head_dim)
        k_LGD = self._linear(x_LH, f"{prefix}k_proj").view(length, self.num_groups, self.head_dim)
        v_LGD = self._linear(x_LH, f"{prefix}v_proj").view(length, self.num_groups, self.head_dim)
        q_LND = self._rotate(self._norm(q_LND, f"{prefix}q_norm"))
        k_LGD = self._rotate(self._norm(k_LGD, f"{prefix}k_norm"))
        repeats = self.num_heads // self.num_groups
        k_LND, v_LND = k_LGD.repeat_interleave(repeats, 1), v_LGD.repeat_interleave(repeats, 1)
        scores_NLL = torch.einsum("qnd,knd->nqk", q_LND, k_LND) / math.sqrt(self.head_dim)
        is_later_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights_NLL = scores_NLL.masked_fill(is_later_LL, -math.inf).softmax(-1)
        output_LND = torch.einsum("nqk,knd->qnd", weights_NLL, v_LND)
        return self._linear(output_LND.flatten(1), f"{prefix}o_proj")

    def _rotate(self, x_LND: Tensor) -> Tensor:
        """Rotary embedding: dimensions d and d + D/2 are a plane, turned by position * theta^(-2d/D)."""
        half = self.head_dim // 2
        frequencies = self.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(len(x_LND), dtype=torch.float64)[:, None, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = x_LND[..., :half], x_LND[..., half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _swiglu(self, x_LH: Tensor, prefix: str) -> Tensor:
        gate, up = self._linear(x_LH, f"{prefix}gate_proj"), self._linear(x_LH, f"{prefix}up_proj")
        return self._linear(gate * gate.sigmoid() * up, f"{prefix}down_proj")

    def _experts(self, x_LH: Tensor, prefix: str, forced: Tensor | None) -> Tensor:
        """Softmax over all experts, then the K most probable; their weights are made to sum to 1 or not."""
        router_LE = self._linear(x_LH, f"{prefix}gate")
        ordered_LE = router_LE.detach().sort(-1, descending=True).values
        last, first_left_out = ordered_LE[
            :, self.num_experts_per_token - 1 : self.num_experts_per_token + 1
        ].T
        self.router_margin = min(self.router_margin, float((last - first_left_out).min()))
        experts_LK = router_LE.topk(self.num_experts_per_token).indices
        if forced is not None:
            experts_LK = torch.cat([forced, experts_LK[len(forced) :]])
        self._chosen.append(experts_LK)
        weights_LK = router_LE.softmax(-1).gather(-1, experts_LK)
        if self.renormalise:
            weights_LK = weights_LK / weights_LK.sum(-1, keepdim=True)
        output_LH = torch.zeros_like(x_LH)
        for expert in experts_LK.unique().tolist():
            tokens, slots = (experts_LK == expert).nonzero(as_tuple=True)
            y = self._swiglu(x_LH[tokens], f"{prefix}experts.{expert}.")
            output_LH = output_LH.index_add(0, tokens, y * weights_LK[tokens, slots, None])
        return output_LH


def _rope_theta(config: HfConfig) -> float:
    """transformers 5 writes it into `rope_parameters`."""
    return (config.section("rope_parameters") if config.has("rope_parameters") else config).get(
        "rope_theta", float
    )


def _moe_layers(config: HfConfig) -> set[int]:
    """Layers that have experts; none in a dense model."""
    if config.get("model_type", str) != "qwen3_moe":
        return set()
    step = config.get("decoder_sparse_step", int, 1)
    dense = config.get_ints("mlp_only_layers")
    layers = range(config.get("num_hidden_layers", int))
    return {layer for layer in layers if (layer + 1) % step == 0 and layer not in dense}
