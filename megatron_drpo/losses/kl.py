"""The penalty on the divergence from a frozen reference policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.config.schema import KlConfig, KlEstimator
from megatron_drpo.losses.tokens import LOG_RATIO_MAX, LossTokens


@dataclass(frozen=True, kw_only=True)
class KlPenalty:
    """coef times an estimate of KL(pi || ref) from the sampled token, with x = logpi - logref
    (Schulman, http://joschu.net/blog/kl-approx.html):

        k1 = x                         dk1/dlogpi = 1
        k2 = x^2 / 2                   dk2/dlogpi = x
        k3 = e^-x - 1 + x              dk3/dlogpi = 1 - e^-x

    On-policy, k2's gradient is the gradient of KL(pi || ref); k3's is that of KL(ref || pi); k1's has mean 0
    (arXiv 2506.09477), so as a loss it only adds noise. -x is held at `LOG_RATIO_MAX` in k3.
    """

    coef: float
    estimator: KlEstimator

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        x_N = tokens.logprobs_N - _reference(tokens)
        match self.estimator:
            case KlEstimator.k1:
                return self.coef * x_N
            case KlEstimator.k2:
                return self.coef * x_N.square() / 2
            case KlEstimator.k3:
                return self.coef * ((-x_N).clamp(max=LOG_RATIO_MAX).exp() - 1 + x_N)

    @torch.no_grad()
    def logprob_gradient(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """In closed form, as autograd of `value` gives it."""
        x_N = tokens.logprobs_N - _reference(tokens)
        match self.estimator:
            case KlEstimator.k1:
                return torch.full_like(x_N, self.coef)
            case KlEstimator.k2:
                return self.coef * x_N
            case KlEstimator.k3:
                inverse_ratio_N = (-x_N).clamp(max=LOG_RATIO_MAX).exp()
                return self.coef * (1 - inverse_ratio_N * (-x_N <= LOG_RATIO_MAX))

    def warnings(self) -> list[str]:
        if self.estimator is not KlEstimator.k1:
            return []
        return ["algorithm.kl.estimator=k1: its gradient has mean 0, it only adds noise; use k2 or k3"]


def build_kl_penalty(config: KlConfig) -> KlPenalty | None:
    """None when the coefficient is 0."""
    return KlPenalty(coef=config.coef, estimator=config.estimator) if config.coef else None


def _reference(tokens: LossTokens) -> Float[Tensor, " N"]:
    if tokens.ref_logprobs_N is None:
        raise ValueError("a KL penalty needs the reference policy's logprobs")
    return tokens.ref_logprobs_N
