"""The clipped ratio of PPO (arXiv 1707.06347 Eq. 7) as GRPO uses it (arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config import LossConfig
from megatron_drpo.losses.base import Loss, compute_ratio, compute_unclamped


@dataclass(frozen=True, kw_only=True)
class GrpoLoss(Loss):
    """L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), w = 1 where the ratio is not clipped, else 0.

    clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476 Eq. 10). With dual_clip = c, for A < 0 also
    L <= c |A| (arXiv 1912.09729 Eq. 5). A ratio that equals a bound counts as not clipped.
    """

    clip_low: float
    clip_high: float
    dual_clip: float | None

    @classmethod
    def from_config(cls, config: LossConfig) -> GrpoLoss:
        return cls(clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip)

    def value(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        ratio_T = compute_ratio(logprobs_T, rollout_logprobs_T)
        return -advantages_T * self._clip(ratio_T, advantages_T)

    @torch.no_grad()
    def weight(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        ratio_T = compute_ratio(logprobs_T, rollout_logprobs_T)
        free_T = self._clip(ratio_T, advantages_T) == ratio_T
        return (free_T & compute_unclamped(logprobs_T, rollout_logprobs_T)).to(logprobs_T.dtype)

    @torch.no_grad()
    def outside_trust_region(
        self, logprobs_T: Float[Tensor, " T"], rollout_logprobs_T: Float[Tensor, " T"]
    ) -> Bool[Tensor, " T"]:
        """r outside [1 - clip_low, 1 + clip_high], whatever the sign of A."""
        ratio_T = compute_ratio(logprobs_T, rollout_logprobs_T)
        return (ratio_T < 1 - self.clip_low) | (ratio_T > 1 + self.clip_high)

    def _clip(self, ratio_T: Float[Tensor, " T"], advantages_T: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        """The bounds that the maximum leaves: upper for A > 0, lower (and the dual clip) for A < 0."""
        if_positive_T = ratio_T.clamp(max=1 + self.clip_high)
        if_negative_T = ratio_T.clamp(min=1 - self.clip_low, max=self.dual_clip)
        return torch.where(
            advantages_T > 0, if_positive_T, torch.where(advantages_T < 0, if_negative_T, ratio_T)
        )
