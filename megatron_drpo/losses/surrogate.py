"""The unregularised importance-sampled policy gradient: TRPO's objective (arXiv 1502.05477 Eq. 14)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.config import LossConfig
from megatron_drpo.losses.base import Loss, compute_ratio, compute_unclamped


@dataclass(frozen=True)
class SurrogateLoss(Loss):
    """L = -A r, w = 1."""

    @classmethod
    def from_config(cls, config: LossConfig) -> SurrogateLoss:
        return cls()

    def value(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        return -advantages_T * compute_ratio(logprobs_T, rollout_logprobs_T)

    @torch.no_grad()
    def weight(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        return compute_unclamped(logprobs_T, rollout_logprobs_T).to(logprobs_T.dtype)
