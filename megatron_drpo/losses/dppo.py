"""Divergence proximal policy optimisation: a mask on the divergence of pi from mu (arXiv 2602.04879)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import RatioLoss
from megatron_drpo.losses.tokens import LossTokens, TopK

OTHERS_MIN = torch.finfo(torch.float32).eps
"""Least probability of all other tokens in a binary KL. A float32 logprob within about this of 0 rounds to 0,
which says that the token is near certain, not that it is: log(1 - 1) would make the KL of two policies
that hardly differ infinite. The same in float64, which holds float32 values where metrics are computed."""
REST_MIN = 1e-6
"""Least mass of the rest bin in a top-K KL. Logprobs are float32, so K probabilities add up to 1 within about
this: a smaller rest is rounding noise, and an empty one would make the KL infinite for equal policies."""


@dataclass(frozen=True, kw_only=True)
class DppoLoss(RatioLoss):
    """L = -A sg(min(r, ratio_cap)) mask logpi
    w = mask min(1, ratio_cap / r); 0 where the ratio is clamped

    mask is 0 where the divergence of pi from mu exceeds mask_high (A > 0) or mask_low (A < 0) and the token
    moves on in its advantage's direction: A (pi - mu) > 0 for the sampled token. A token that moves back
    always keeps its gradient. The subclasses are the paper's four estimates of the divergence.
    """

    mask_high: float
    mask_low: float
    ratio_cap: float | None = None

    @classmethod
    def from_config(cls, config: LossConfig) -> DppoLoss:
        return cls(**_shared(config))

    @abstractmethod
    def divergence(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """Of pi from mu, in nats for KL; never negative but for rounding."""

    def sampled_change(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """pi - mu of the sampled token: its sign is the direction."""
        return tokens.difference_N

    def value(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        ratio_N = tokens.ratio_N.detach()
        if self.ratio_cap is not None:
            ratio_N = ratio_N.clamp(max=self.ratio_cap)
        kept_N = ~self._is_masked(tokens) & tokens.is_unclamped_N
        return -tokens.advantages_N * ratio_N * kept_N * tokens.logprobs_N

    @torch.no_grad()
    def weight(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        kept_N = ~self._is_masked(tokens) & tokens.is_unclamped_N
        if self.ratio_cap is None:
            return kept_N.to(tokens.logprobs_N.dtype)
        return kept_N * (self.ratio_cap / tokens.ratio_N).clamp(max=1)

    @torch.no_grad()
    def outside_trust_region(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        """Divergence above mask_high where pi > mu, above mask_low where pi < mu, whatever the sign of A."""
        divergence_N, change_N = self.divergence(tokens), self.sampled_change(tokens)
        is_above_N = (change_N > 0) & (divergence_N > self.mask_high)
        return is_above_N | ((change_N < 0) & (divergence_N > self.mask_low))

    def warnings(self) -> list[str]:
        if self.ratio_cap is None or self.ratio_cap >= 1:
            return []
        return [
            f"algorithm.loss.ratio_cap={self.ratio_cap}: a cap below 1 also scales down tokens that "
            "have not moved; DPPO's own setting is 10000"
        ]

    @torch.no_grad()
    def _is_masked(self, tokens: LossTokens) -> Bool[Tensor, " N"]:
        is_diverging_N = tokens.advantages_N * self.sampled_change(tokens).sign() > 0
        return is_diverging_N & self.outside_trust_region(tokens)


@dataclass(frozen=True, kw_only=True)
class DppoBinaryTvLoss(DppoLoss):
    """Total variation of (sampled token, all others): |pi - mu|."""

    @torch.no_grad()
    def divergence(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return tokens.difference_N.abs()

    def warnings(self) -> list[str]:
        return _warn_of_tv(self) + super().warnings()


@dataclass(frozen=True, kw_only=True)
class DppoBinaryKlLoss(DppoLoss):
    """KL(mu || pi) of (sampled token, all others):
    mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)), with 1 - mu and 1 - pi at least `OTHERS_MIN`."""

    @torch.no_grad()
    def divergence(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        logmu_N = tokens.anchor_logprobs_N.clamp(max=0)  # an engine may report 1e-7 for a certain token
        logpi_N = tokens.logprobs_N.clamp(max=0)
        others_N = (-torch.expm1(logmu_N)).clamp(min=OTHERS_MIN)
        return logmu_N.exp() * (logmu_N - logpi_N) + others_N * (_log_others(logmu_N) - _log_others(logpi_N))


@dataclass(frozen=True, kw_only=True)
class DppoTopkLoss(DppoLoss):
    """The divergence is that of K + 1 bins: the K ids that the rollout found most probable, and the rest.

    It is taken from the rollout's distribution, whatever the anchor, and so is the direction.
    """

    num_ids: int
    """K."""

    @classmethod
    def from_config(cls, config: LossConfig) -> DppoTopkLoss:
        return cls(num_ids=config.num_topk, **_shared(config))

    @property
    def num_topk(self) -> int:
        return self.num_ids

    def sampled_change(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return tokens.probs_N - tokens.rollout_logprobs_N.exp()


@dataclass(frozen=True, kw_only=True)
class DppoTopkTvLoss(DppoTopkLoss):
    """Total variation: half of sum |pi_k - mu_k| over the K + 1 bins."""

    @torch.no_grad()
    def divergence(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        topk = _topk(tokens)
        differences_NK = topk.logprobs_NK.exp() - topk.rollout_logprobs_NK.exp()
        rest_N = _rest(topk.logprobs_NK) - _rest(topk.rollout_logprobs_NK)
        return (differences_NK.abs().sum(dim=1) + rest_N.abs()) / 2

    def warnings(self) -> list[str]:
        return _warn_of_tv(self) + super().warnings()


@dataclass(frozen=True, kw_only=True)
class DppoTopkKlLoss(DppoTopkLoss):
    """KL(mu || pi) = sum mu_k log(mu_k / pi_k) over the K + 1 bins; the rest bin has at least `REST_MIN`."""

    @torch.no_grad()
    def divergence(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        topk = _topk(tokens)
        mu_NK = topk.rollout_logprobs_NK.exp()
        terms_NK = mu_NK * (topk.rollout_logprobs_NK - topk.logprobs_NK)
        terms_NK = torch.where(mu_NK == 0, torch.zeros_like(mu_NK), terms_NK)
        rest_pi_N = _rest(topk.logprobs_NK).clamp(min=REST_MIN)
        rest_mu_N = _rest(topk.rollout_logprobs_NK).clamp(min=REST_MIN)
        return terms_NK.sum(dim=1) + rest_mu_N * (rest_mu_N / rest_pi_N).log()


def _shared(config: LossConfig) -> dict[str, Any]:
    mask_low = config.mask_high if config.mask_low is None else config.mask_low
    return {"mask_high": config.mask_high, "mask_low": mask_low, "ratio_cap": config.ratio_cap}


def _topk(tokens: LossTokens) -> TopK:
    if tokens.topk is None:
        raise ValueError("a top-k divergence needs the rollout's top-k logprobs")
    return tokens.topk


def _rest(logprobs_NK: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """1 - sum of the K probabilities, without the loss of digits of 1 - p near p = 1; never negative."""
    return -torch.expm1(logprobs_NK.logsumexp(dim=1).clamp(max=0))


def _log_others(x_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log(1 - e^x) for x <= 0 to full precision, at least log `OTHERS_MIN`."""
    log_others_N = torch.where(x_N > -math.log(2), (-torch.expm1(x_N)).log(), torch.log1p(-x_N.exp()))
    return log_others_N.clamp(min=math.log(OTHERS_MIN))


def _warn_of_tv(loss: DppoLoss) -> list[str]:
    names = [name for name in ("mask_high", "mask_low") if getattr(loss, name) >= 1]
    return [
        f"algorithm.loss.{name}={getattr(loss, name)}: a total variation never exceeds 1, so nothing is "
        "masked; 0.15 to 0.2 makes it act"
        for name in names
    ]
