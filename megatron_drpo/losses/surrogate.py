"""The unregularised importance-sampled policy gradient: TRPO's objective (arXiv 1502.05477 Eq. 14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import RatioLoss
from megatron_drpo.losses.tokens import LossTokens


@dataclass(frozen=True)
class SurrogateLoss(RatioLoss):
    """L = -A r
    w = 1; 0 where the ratio is clamped"""

    has_trust_region: ClassVar[bool] = False

    @classmethod
    def from_config(cls, config: LossConfig) -> SurrogateLoss:
        return cls()

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return -tokens.advantages_N * tokens.ratio_N

    @torch.no_grad()
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return tokens.is_unclamped_N.to(tokens.logprobs_N.dtype)
