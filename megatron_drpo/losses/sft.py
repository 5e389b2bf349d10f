"""Maximum likelihood on demonstrations, for `train.mode=sft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.tokens import LossTokens


@dataclass(frozen=True)
class SftLoss(Loss):
    """L = -logpi, dL/dlogpi = -1.

    There is no behaviour policy: only logprobs_N is read, the coefficient is 1 instead of A r, and w is
    reported as 1.
    """

    has_trust_region: ClassVar[bool] = False

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return -tokens.logprobs_N

    @torch.no_grad()
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return -torch.ones_like(tokens.logprobs_N)

    @torch.no_grad()
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return torch.ones_like(tokens.logprobs_N)
