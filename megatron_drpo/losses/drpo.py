"""Divergence-regularised policy optimisation (arXiv 2606.09821)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config import LossConfig
from megatron_drpo.losses.base import RatioLoss
from megatron_drpo.losses.tokens import LossTokens


@dataclass(frozen=True, kw_only=True)
class DrpoLoss(RatioLoss):
    """L = -A r + |A| mu (r - 1)^2 / (2 delta)     (Eq. 8)
    w = 1 - sign(A (r - 1)) |pi - mu| / delta     (Eq. 9, Table 1)

    A token that moves away from mu in its advantage's direction loses weight linearly in |pi - mu|; beyond
    delta its gradient turns and corrects it. A token that moves back gains weight.
    """

    delta: float
    """Bound on |pi - mu|, which itself never exceeds 1."""

    @classmethod
    def from_config(cls, config: LossConfig) -> DrpoLoss:
        return cls(delta=config.delta)

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        # r - 1, not expm1: expm1's derivative would lose the digits of a small r.
        ratio_N = tokens.ratio_N
        penalty_N = tokens.anchor_probs_N * (ratio_N - 1).square() / (2 * self.delta)
        return -tokens.advantages_N * ratio_N + tokens.advantages_N.abs() * penalty_N

    @torch.no_grad()
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        weight_N = 1 - tokens.advantages_N.sign() * tokens.difference_N / self.delta
        return weight_N * tokens.is_unclamped_N

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """|pi - mu| > delta."""
        return (tokens.logprobs_N.exp() - tokens.anchor_probs_N).abs() > self.delta

    def warnings(self) -> list[str]:
        return warn_of_delta(self.delta)


def warn_of_delta(delta: float) -> list[str]:
    """What to say of a bound on |pi - mu| that can never bind."""
    if delta < 1:
        return []
    return [
        f"algorithm.loss.delta={delta}: |pi - mu| never exceeds 1, so the bound cannot bind and w "
        f"stays within {1 - 1 / delta:.3g} .. {1 + 1 / delta:.3g}; 0.05 to 0.2 makes it act"
    ]
