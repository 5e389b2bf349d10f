"""What is minimised per loss token: the loss, corrected for mismatch, with KL penalty and entropy bonus.

    objective = c * loss + kl_coef * KL-estimate - entropy_coef * H

with c the product of the corrections' factors, which have no gradient. A token that a correction masks
(c = 0) still has its KL penalty and entropy bonus: they do not depend on how it was sampled.

Tokens that are faulty (`Objective.is_faulty`) must not be among those that are minimised: they are found, and
left out, before (`policy/faulty_tokens.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config.schema import AlgorithmConfig
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.corrections import Correction, build_corrections
from megatron_drpo.losses.kl import KlPenalty, build_kl_penalty
from megatron_drpo.losses.registry import build_loss
from megatron_drpo.losses.tokens import LossTokens


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Pure; `build_objective` makes it from the configuration."""

    loss: Loss
    corrections: tuple[Correction, ...] = ()
    kl: KlPenalty | None = None
    entropy_coef: float = 0.0
    faulty_log_ratio: float = math.inf

    @property
    def needs_sequences(self) -> bool:
        """A token's gradient depends on its whole sequence, so it is not known chunk by chunk."""
        return self.loss.needs_sequences or any(c.needs_sequences for c in self.corrections)

    def value(
        self, tokens: LossTokens, entropy_N: Float[Tensor, " N"], factor_N: Float[Tensor, " N"] | None = None
    ) -> Float[Tensor, " N"]:
        """The objective per token, differentiable with respect to logprobs_N and entropy_N.

        Args:
            factor_N: what `factor` gave for these tokens, if it is at hand.
        """
        if self.corrections:
            factor_N = self.factor(tokens) if factor_N is None else factor_N
            is_masked_N = factor_N == 0
            # where and detach, not multiplication: a masked token has value and gradient 0, be its loss NaN.
            logprobs_N = torch.where(is_masked_N, tokens.logprobs_N.detach(), tokens.logprobs_N)
            value_N = self.loss.value(tokens.with_logprobs(logprobs_N)) * factor_N
            value_N = torch.where(is_masked_N, torch.zeros_like(value_N), value_N)
        else:
            value_N = self.loss.value(tokens)
        if self.kl is not None:
            value_N = value_N + self.kl.value(tokens)
        if self.entropy_coef:
            value_N = value_N - self.entropy_coef * entropy_N
        return value_N

    @torch.no_grad()
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """d objective / dlogpi per token in closed form; the gradient to entropy_N is -entropy_coef."""
        gradient_N = self.loss.logprob_gradient(tokens)
        if self.corrections:
            factor_N = self.factor(tokens)
            gradient_N = torch.where(factor_N == 0, torch.zeros_like(gradient_N), gradient_N * factor_N)
        if self.kl is not None:
            gradient_N = gradient_N + self.kl.logprob_gradient(tokens)
        return gradient_N

    @torch.no_grad()
    def factor(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """The product of the corrections' factors, 0 where one of them is 0; 1 without corrections."""
        product_N = torch.ones_like(tokens.logprobs_N)
        is_masked_N = torch.zeros_like(tokens.logprobs_N, dtype=torch.bool)
        for correction in self.corrections:
            factor_N = correction.factor(tokens)
            product_N = product_N * factor_N
            is_masked_N |= factor_N == 0
        return torch.where(is_masked_N, torch.zeros_like(product_N), product_N)

    @torch.no_grad()
    def is_faulty(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """Where log(pi / mu) exceeds `faulty_log_ratio`, mu as the engine reported it, whatever the anchor.

        No honest engine samples such a token: e^20 is 5e8 times less often than pi would. The other side
        needs no limit: where pi is far below mu, r goes to 0 and the token's gradient with it, and a policy
        that turns away from what it sampled gets there honestly.
        """
        # float64, so that metrics, which are computed in it, count the same tokens.
        return tokens.logprobs_N.double() - tokens.rollout_logprobs_N.double() > self.faulty_log_ratio

    def warnings(self) -> list[str]:
        """Settings that are allowed but hardly meant, one sentence each."""
        return self.loss.warnings() + ([] if self.kl is None else self.kl.warnings())


def build_objective(config: AlgorithmConfig) -> Objective:
    """The objective that the configuration describes.

    Raises:
        ConfigError: the loss is unknown, or the user's function does not give one.
    """
    return Objective(
        loss=build_loss(config.loss),
        corrections=build_corrections(config.correction, config.anchor),
        kl=build_kl_penalty(config.kl),
        entropy_coef=config.entropy_coef,
        faulty_log_ratio=config.correction.faulty_log_ratio,
    )
