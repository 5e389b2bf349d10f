"""DRPO's regulariser only outside DPPO's mask boundary: the ablation Mask-DRPO of arXiv 2606.09821."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import RatioLoss
from megatron_drpo.losses.drpo import warn_of_delta
from megatron_drpo.losses.tokens import LossTokens


@dataclass(frozen=True, kw_only=True)
class MaskDrpoLoss(RatioLoss):
    """w = 1 where |pi - mu| <= m, elsewhere DRPO's w = 1 - sign(A (r - 1)) |pi - mu| / delta
    L = -A r + |A| max(0, (pi - mu)^2 - m^2) / (2 delta mu)

    with m = mask_high for A > 0 and mask_low for A < 0. L is the continuous function with this gradient:
    (pi - mu)^2 / mu = mu (r - 1)^2 is DRPO's penalty, lowered by its value at the boundary and cut off below.
    w is 0 where the ratio is clamped. DPPO gives a diverging token outside the boundary w = 0; here it keeps
    a weight, negative beyond delta, and a token that moves back gains weight.
    """

    delta: float
    mask_high: float
    mask_low: float

    @classmethod
    def from_config(cls, config: LossConfig) -> MaskDrpoLoss:
        mask_low = config.mask_high if config.mask_low is None else config.mask_low
        return cls(delta=config.delta, mask_high=config.mask_high, mask_low=mask_low)

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        ratio_N, mu_N = tokens.ratio_N, tokens.anchor_probs_N
        is_outside_N, boundary_N = self._outside(tokens)
        excess_N = mu_N * (ratio_N - 1).square() - boundary_N.square() / mu_N
        penalty_N = torch.where(is_outside_N, excess_N, torch.zeros_like(mu_N)) / (2 * self.delta)
        return -tokens.advantages_N * ratio_N + tokens.advantages_N.abs() * penalty_N

    @torch.no_grad()
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        is_outside_N, _ = self._outside(tokens)
        change_N = tokens.advantages_N.sign() * tokens.difference_N / self.delta
        return (1 - change_N * is_outside_N) * tokens.is_unclamped_N

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """|pi - mu| > m."""
        difference_N = tokens.probs_N - tokens.anchor_probs_N
        return difference_N.abs() > self._boundary(tokens)

    def warnings(self) -> list[str]:
        warnings = warn_of_delta(self.delta)
        if min(self.mask_high, self.mask_low) >= 1:
            warnings.append(
                f"algorithm.loss.mask_high={self.mask_high}, mask_low={self.mask_low}: |pi - mu| never "
                "exceeds 1, so no token is outside and w is 1 everywhere"
            )
        return warnings

    def _boundary(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """m; A = 0 has no gradient, so either will do."""
        high_N = torch.full_like(tokens.advantages_N, self.mask_high)
        return torch.where(tokens.advantages_N >= 0, high_N, torch.full_like(high_N, self.mask_low))

    @torch.no_grad()
    def _outside(self, tokens: LossTokens) -> tuple[Bool[Tensor, " N"], Float[Tensor, " N"]]:
        """(where the penalty acts, m); one rounding of pi - mu for the value and for w."""
        boundary_N = self._boundary(tokens)
        return tokens.difference_N.abs() > boundary_N, boundary_N
