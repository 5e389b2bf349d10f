"""Divergence-regularised policy optimisation (arXiv 2606.09821)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config import LossConfig
from megatron_drpo.losses.base import Loss, compute_ratio, compute_unclamped


@dataclass(frozen=True, kw_only=True)
class DrpoLoss(Loss):
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

    def value(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        # r - 1, not expm1: expm1's derivative would lose the digits of a small r.
        ratio_T = compute_ratio(logprobs_T, rollout_logprobs_T)
        penalty_T = rollout_logprobs_T.exp() * (ratio_T - 1).square() / (2 * self.delta)
        return -advantages_T * ratio_T + advantages_T.abs() * penalty_T

    @torch.no_grad()
    def weight(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        ratio_T = compute_ratio(logprobs_T, rollout_logprobs_T)
        difference_T = rollout_logprobs_T.exp() * (ratio_T - 1)
        weight_T = 1 - advantages_T.sign() * difference_T / self.delta
        return weight_T * compute_unclamped(logprobs_T, rollout_logprobs_T)

    @torch.no_grad()
    def outside_trust_region(
        self, logprobs_T: Float[Tensor, " T"], rollout_logprobs_T: Float[Tensor, " T"]
    ) -> Bool[Tensor, " T"]:
        """|pi - mu| > delta."""
        return (logprobs_T.exp() - rollout_logprobs_T.exp()).abs() > self.delta

    def warnings(self) -> list[str]:
        if self.delta < 1:
            return []
        return [
            f"algorithm.loss.delta={self.delta}: |pi - mu| never exceeds 1, so the bound cannot bind and w "
            f"stays within {1 - 1 / self.delta:.3g} .. {1 + 1 / self.delta:.3g}; 0.05 to 0.2 makes it act"
        ]
