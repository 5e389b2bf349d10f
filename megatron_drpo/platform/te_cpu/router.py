"""The router's choice and its auxiliary loss in one call each.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/router.py

    T  tokens      E  experts      K  experts per token
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_drpo.errors import PlatformError


def fused_topk_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The chosen experts' weights [T, E], zero elsewhere, and which they are [T, E], in fp32."""
    if group_topk:
        raise PlatformError("the CPU stand-in for Transformer Engine has no group-limited routing")
    scores_TE = logits.float()
    if score_function == "sigmoid":
        scores_TE = scores_TE.sigmoid()
    elif use_pre_softmax:
        scores_TE = scores_TE.softmax(-1)
    choice_TE = scores_TE if expert_bias is None else scores_TE + expert_bias
    index_TK = choice_TE.topk(topk, dim=-1).indices
    weight_TK = scores_TE.gather(1, index_TK)
    if score_function == "sigmoid":
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20) if topk > 1 else weight_TK
    elif not use_pre_softmax:
        weight_TK = weight_TK.softmax(-1)
    weight_TK = weight_TK * (scaling_factor or 1.0)
    zeros_TE = torch.zeros_like(scores_TE)
    probs_TE = zeros_TE.scatter(1, index_TK, weight_TK).to(logits.dtype)
    return probs_TE, zeros_TE.bool().scatter(1, index_TK, True)


def fused_compute_score_for_moe_aux_loss(
    logits: Tensor, topk: int, score_function: str
) -> tuple[Tensor, Tensor]:
    """Which experts a token would go to without a bias [T, E], and the normalised scores [T, E]."""
    scores_TE = logits.float().softmax(-1) if score_function == "softmax" else logits.float().sigmoid()
    if score_function == "sigmoid":
        scores_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    index_TK = scores_TE.topk(topk, dim=-1).indices
    return torch.zeros_like(scores_TE).bool().scatter(1, index_TK, True), scores_TE


def fused_moe_aux_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int,
    num_experts: int,
    topk: int,
    coeff: float,
) -> Tensor:
    """Switch Transformer's load-balancing loss (arXiv 2101.03961, equation 4), of summed scores [T, E]."""
    scores_E = probs.float().sum(0)
    scale = num_experts * coeff / (topk * total_num_tokens**2)
    return (scores_E * tokens_per_expert).sum() * scale
