"""Simple policy optimisation: a quadratic penalty on the ratio (arXiv 2401.16025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import Loss, RatioLoss
from megatron_drpo.losses.tokens import LossTokens

SPO_LOG_RATIO_MAX = 20.0
"""Upper clamp of logpi - logmu, in nats, below the family's: r enters squared, and the square of the gradient
norm must stay finite in float32. It is the clamp of the DRPO authors' code. A ratio above e^20 (mu below
2e-9) is held there; being constant, such a token has no gradient and its w is 0."""


@dataclass(frozen=True, kw_only=True)
class SpoLoss(RatioLoss):
    """L = -A r + |A| (r - 1)^2 / (2 epsilon)
    w = 1 - sign(A (r - 1)) |r - 1| / epsilon; 0 where the ratio is clamped (`SPO_LOG_RATIO_MAX`)

    DRPO's form with a bound on the ratio instead of on pi - mu: a token sampled with a small mu leaves it at
    once.
    """

    epsilon: float
    """Bound on |r - 1|."""

    @classmethod
    def from_config(cls, config: LossConfig) -> SpoLoss:
        return cls(epsilon=config.epsilon)

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        ratio_N = _ratio(tokens)
        penalty_N = (ratio_N - 1).square() / (2 * self.epsilon)
        return -tokens.advantages_N * ratio_N + tokens.advantages_N.abs() * penalty_N

    @torch.no_grad()
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        weight_N = 1 - tokens.advantages_N.sign() * (_ratio(tokens) - 1) / self.epsilon
        return weight_N * _is_unclamped(tokens)

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """|r - 1| > epsilon."""
        return (tokens.ratio_N - 1).abs() > self.epsilon

    def warnings(self) -> list[str]:
        if self.epsilon < 1:
            return []
        return [
            f"algorithm.loss.epsilon={self.epsilon}: r - 1 is never below -1, so the bound cannot bind where "
            "the probability falls; 0.2 makes it act on both sides"
        ]


@dataclass(frozen=True, kw_only=True)
class SpoUnweightedLoss(Loss):
    """L = -A r + (r - 1)^2 / (2 epsilon)
    dL/dlogpi = r ((r - 1) / epsilon - A); 0 where the ratio is clamped (`SPO_LOG_RATIO_MAX`)

    The ablation without |A| before the penalty. The gradient turns at |r - 1| = |A| epsilon, and a token with
    A = 0 is pulled back to mu.
    """

    epsilon: float
    """Bound on |r - 1| where |A| = 1."""

    @classmethod
    def from_config(cls, config: LossConfig) -> SpoUnweightedLoss:
        return cls(epsilon=config.epsilon)

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        ratio_N = _ratio(tokens)
        return -tokens.advantages_N * ratio_N + (ratio_N - 1).square() / (2 * self.epsilon)

    @torch.no_grad()
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        ratio_N = _ratio(tokens)
        gradient_N = ratio_N * ((ratio_N - 1) / self.epsilon - tokens.advantages_N)
        return gradient_N * _is_unclamped(tokens)

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """|r - 1| > |A| epsilon."""
        return (tokens.ratio_N - 1).abs() > tokens.advantages_N.abs() * self.epsilon

    def warnings(self) -> list[str]:
        if self.epsilon < 1:
            return []
        return [
            f"algorithm.loss.epsilon={self.epsilon}: r - 1 is never below -1, so where the probability falls "
            f"the bound |A| epsilon binds only for |A| < {1 / self.epsilon:.3g}"
        ]


def _ratio(tokens: LossTokens) -> Float[Tensor, " N"]:
    return tokens.log_ratio_N.clamp(max=SPO_LOG_RATIO_MAX).exp()


def _is_unclamped(tokens: LossTokens) -> Bool[Tensor, " N"]:
    return tokens.log_ratio_N <= SPO_LOG_RATIO_MAX
