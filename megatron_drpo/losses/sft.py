"""Maximum likelihood on demonstrations, for `train.mode=sft`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.losses.base import Loss


@dataclass(frozen=True)
class SftLoss(Loss):
    """L = -logpi, dL/dlogpi = -1.

    There is no behaviour policy: rollout_logprobs_T and advantages_T are not read, the coefficient is 1
    instead of A r, and w is reported as 1.
    """

    def value(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        return -logprobs_T

    @torch.no_grad()
    def weight(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        return torch.ones_like(logprobs_T)

    @torch.no_grad()
    def logprob_gradient(
        self,
        logprobs_T: Float[Tensor, " T"],
        rollout_logprobs_T: Float[Tensor, " T"],
        advantages_T: Float[Tensor, " T"],
    ) -> Float[Tensor, " T"]:
        return -torch.ones_like(logprobs_T)
