"""Group sequence policy optimisation: the clipped ratio of whole sequences (arXiv 2507.18071)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.grpo import clip_pessimistic, is_outside, warn_of_clip_low
from megatron_drpo.losses.tokens import LOG_RATIO_MAX, LossTokens


@dataclass(frozen=True, kw_only=True)
class GspoLoss(Loss):
    """L_t = max(-A s_t, -A clip(s_t, 1 - clip_low, 1 + clip_high))
    dL_t/dlogpi_t = -A s where the maximum leaves s unclipped, else 0

    with s_t = sg(s) pi_t / sg(pi_t), which has the value of the sequence's ratio
    s = exp(mean of logpi - logmu over the loss tokens of the sequence) and the gradient of the token: the
    paper's GSPO-token, which allows advantages per token. Where advantages and token weights are equal within
    a sequence, the gradient of the whole sequence is that of GSPO. log s is held at `LOG_RATIO_MAX`; there
    the gradient is 0.
    """

    needs_sequences: ClassVar[bool] = True

    clip_low: float
    clip_high: float

    @classmethod
    def from_config(cls, config: LossConfig) -> GspoLoss:
        return cls(clip_low=config.clip_low, clip_high=config.clip_high)

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        # The difference is 0 and its gradient 1: s_t in the logarithm.
        token_N = tokens.logprobs_N - tokens.logprobs_N.detach()
        ratio_N = (_mean_log_ratio(tokens) + token_N).clamp(max=LOG_RATIO_MAX).exp()
        clipped_N = clip_pessimistic(ratio_N, tokens.advantages_N, self.clip_low, self.clip_high)
        return -tokens.advantages_N * clipped_N

    @torch.no_grad()
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        mean_N = _mean_log_ratio(tokens)
        ratio_N = mean_N.clamp(max=LOG_RATIO_MAX).exp()
        clipped_N = clip_pessimistic(ratio_N, tokens.advantages_N, self.clip_low, self.clip_high)
        is_free_N = (clipped_N == ratio_N) & (mean_N <= LOG_RATIO_MAX)
        return -tokens.advantages_N * ratio_N * is_free_N

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """s outside [1 - clip_low, 1 + clip_high], whatever the sign of A."""
        ratio_N = _mean_log_ratio(tokens).clamp(max=LOG_RATIO_MAX).exp()
        return is_outside(ratio_N, self.clip_low, self.clip_high)

    def warnings(self) -> list[str]:
        names = [name for name in ("clip_low", "clip_high") if getattr(self, name) >= 0.05]
        warnings = [
            f"algorithm.loss.{name}={getattr(self, name)}: a mean over a sequence hardly moves this far; "
            "GSPO's own bounds are clip_low=0.0003 and clip_high=0.0004"
            for name in names
        ]
        return warnings + warn_of_clip_low(self.clip_low)


def _mean_log_ratio(tokens: LossTokens) -> Float[Tensor, " N"]:
    return tokens.mean_over_sequence(tokens.logprobs_N - tokens.anchor_logprobs_N)
