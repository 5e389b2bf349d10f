"""The clipped ratio of PPO (arXiv 1707.06347 Eq. 7) as GRPO uses it (arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import RatioLoss
from megatron_drpo.losses.tokens import LossTokens


@dataclass(frozen=True, kw_only=True)
class GrpoLoss(RatioLoss):
    """L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
    w = 1 where the maximum leaves the ratio unclipped, else 0; 0 where the ratio is clamped

    clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476 Eq. 10). With dual_clip = c, for A < 0 also
    L <= c |A| (arXiv 1912.09729 Eq. 5). A ratio that equals a bound counts as not clipped.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None = None

    @classmethod
    def from_config(cls, config: LossConfig) -> GrpoLoss:
        return cls(clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip)

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return -tokens.advantages_N * self._clip(tokens)

    @torch.no_grad()
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        is_free_N = self._clip(tokens) == tokens.ratio_N
        return (is_free_N & tokens.is_unclamped_N).to(tokens.logprobs_N.dtype)

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """r outside [1 - clip_low, 1 + clip_high], whatever the sign of A."""
        return is_outside(tokens.ratio_N, self.clip_low, self.clip_high)

    def warnings(self) -> list[str]:
        return warn_of_clip_low(self.clip_low)

    def _clip(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return clip_pessimistic(
            tokens.ratio_N, tokens.advantages_N, self.clip_low, self.clip_high, self.dual_clip
        )


def clip_pessimistic(
    ratio_N: Float[Tensor, " N"],
    advantages_N: Float[Tensor, " N"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Tensor, " N"]:
    """x with max(-A r, -A clip(r)) = -A x: the upper bound for A > 0; the lower, and dual_clip, for A < 0.

    Not torch.maximum: it would halve the gradient where both are equal.
    """
    if_positive_N = ratio_N.clamp(max=1 + clip_high)
    if_negative_N = ratio_N.clamp(min=1 - clip_low, max=dual_clip)
    return torch.where(advantages_N > 0, if_positive_N, torch.where(advantages_N < 0, if_negative_N, ratio_N))


def is_outside(ratio_N: Float[Tensor, " N"], clip_low: float, clip_high: float) -> Bool[Tensor, " N"]:
    """Ratio outside [1 - clip_low, 1 + clip_high]."""
    return (ratio_N < 1 - clip_low) | (ratio_N > 1 + clip_high)


def warn_of_clip_low(clip_low: float) -> list[str]:
    """What to say of a lower bound that no ratio can reach."""
    if clip_low < 1:
        return []
    return [f"algorithm.loss.clip_low={clip_low}: a ratio is never below 0, so the lower clip cannot bind"]
