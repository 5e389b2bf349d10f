"""Divergence-regularised policy optimisation (arXiv 2606.09821)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import Loss, RatioLoss
from megatron_drpo.losses.tokens import LossTokens


@dataclass(frozen=True, kw_only=True)
class DrpoLoss(RatioLoss):
    """L = -A r + |A| mu (r - 1)^2 / (2 delta)     (Eq. 8)
    w = 1 - sign(A (r - 1)) |pi - mu| / delta     (Eq. 9, Table 1); 0 where the ratio is clamped

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
        return (tokens.probs_N - tokens.anchor_probs_N).abs() > self.delta

    def warnings(self) -> list[str]:
        return warn_of_delta(self.delta)


@dataclass(frozen=True, kw_only=True)
class DrpoUnweightedLoss(Loss):
    """L = -A r + mu (r - 1)^2 / (2 delta)
    dL/dlogpi = r ((pi - mu) / delta - A); 0 where the ratio is clamped

    The paper's ablation without |A| before the penalty. The gradient turns at |pi - mu| = |A| delta, so small
    advantages move nothing, and a token with A = 0 is pulled back to mu.
    """

    delta: float
    """Bound on |pi - mu| where |A| = 1."""

    @classmethod
    def from_config(cls, config: LossConfig) -> DrpoUnweightedLoss:
        return cls(delta=config.delta)

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        ratio_N = tokens.ratio_N
        penalty_N = tokens.anchor_probs_N * (ratio_N - 1).square() / (2 * self.delta)
        return -tokens.advantages_N * ratio_N + penalty_N

    @torch.no_grad()
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        gradient_N = tokens.ratio_N * (tokens.difference_N / self.delta - tokens.advantages_N)
        return gradient_N * tokens.is_unclamped_N

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """|pi - mu| > |A| delta."""
        difference_N = tokens.probs_N - tokens.anchor_probs_N
        return difference_N.abs() > tokens.advantages_N.abs() * self.delta

    def warnings(self) -> list[str]:
        if self.delta < 1:
            return []
        return [
            f"algorithm.loss.delta={self.delta}: |pi - mu| never exceeds 1, so the bound |A| delta binds "
            f"only where |A| < {1 / self.delta:.3g}; 0.05 to 0.2 makes it act"
        ]


def warn_of_delta(delta: float) -> list[str]:
    """What to say of a bound on |pi - mu| that can never bind."""
    if delta < 1:
        return []
    return [
        f"algorithm.loss.delta={delta}: |pi - mu| never exceeds 1, so the bound cannot bind and w "
        f"stays within {1 - 1 / delta:.3g} .. {1 + 1 / delta:.3g}; 0.05 to 0.2 makes it act"
    ]
