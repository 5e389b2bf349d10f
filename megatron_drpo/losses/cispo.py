"""Clipped importance-sampling weights, every token kept: CISPO of MiniMax-M1 (arXiv 2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.grpo import is_outside
from megatron_drpo.losses.tokens import LossTokens


@dataclass(frozen=True, kw_only=True)
class CispoLoss(Loss):
    """L = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logpi
    dL/dlogpi = -A clip(r, 1 - clip_low, 1 + clip_high)

    The coefficient is bounded for every ratio, so the clamp of the log-ratio changes nothing, and no token
    loses its gradient. MiniMax-M1 bounds from above only: clip_low=1.
    """

    clip_low: float
    clip_high: float

    @classmethod
    def from_config(cls, config: LossConfig) -> CispoLoss:
        return cls(clip_low=config.clip_low, clip_high=config.clip_high)

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return self.logprob_gradient(tokens) * tokens.logprobs_N

    @torch.no_grad()
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return -tokens.advantages_N * tokens.ratio_N.clamp(min=1 - self.clip_low, max=1 + self.clip_high)

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """r outside [1 - clip_low, 1 + clip_high], whatever the sign of A."""
        return is_outside(tokens.ratio_N, self.clip_low, self.clip_high)
