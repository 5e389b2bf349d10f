"""Objectives and metrics in float64, written down from their formulas: what parity is measured against.

Nothing here comes from `megatron_drpo.losses` or `megatron_drpo.metrics`. Losses are values from
probabilities, their gradients autograd's; sums run over the sequences of the whole global batch.

    N  loss tokens        K  most probable ids        S  sequences
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_drpo.config.schema import (
    Aggregation,
    AlgorithmConfig,
    Anchor,
    CorrectionConfig,
    KlEstimator,
    LossConfig,
    TokenCorrection,
)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The loss tokens of a global batch, float64. Only `logpi` and `entropy` have a gradient."""

    logpi: Tensor
    entropy: Tensor
    logmu: Tensor
    """The anchor's."""
    rollout: Tensor
    """log mu as the engine reported it."""
    advantage: Tensor
    logref: Tensor
    topk_logpi: Tensor
    """[N, K]"""
    topk_logmu: Tensor
    sequence: Tensor
    """int64 [N], 0 .. S - 1."""

    @property
    def pi(self) -> Tensor:
        return self.logpi.exp()

    @property
    def mu(self) -> Tensor:
        return self.logmu.exp()

    @property
    def r(self) -> Tensor:
        return self.pi / self.mu

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[N]: the mean over each token's sequence, a constant."""
        means = torch.zeros_like(values)
        for number in self.sequence.unique():
            means[self.sequence == number] = values[self.sequence == number].mean().item()
        return means


# ------------------------------------------------------------------------------------------- losses

Loss = Callable[[Tokens, LossConfig], Tensor]
"""A number per token."""


def _kl_binary(t: Tokens) -> Tensor:
    return t.mu * (t.mu / t.pi).log() + (1 - t.mu) * ((1 - t.mu) / (1 - t.pi)).log()


def _with_rest(logprobs: Tensor) -> Tensor:
    """[N, K + 1]: the probabilities and what is left of 1."""
    return torch.cat([logprobs.exp(), 1 - logprobs.exp().sum(1, keepdim=True)], 1)


def _tv_topk(t: Tokens) -> Tensor:
    return (_with_rest(t.topk_logpi) - _with_rest(t.topk_logmu)).abs().sum(1) / 2


def _kl_topk(t: Tokens) -> Tensor:
    pi, mu = _with_rest(t.topk_logpi), _with_rest(t.topk_logmu)
    return (mu * (mu / pi).log()).sum(1)


def _mask_bound(t: Tokens, c: LossConfig, is_high: Tensor) -> Tensor:
    low = c.mask_high if c.mask_low is None else c.mask_low
    return torch.where(is_high, c.mask_high, low)


def _clipped(ratio: Tensor, t: Tokens, c: LossConfig) -> Tensor:
    a = t.advantage
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - c.clip_low, 1 + c.clip_high))


def _grpo(t: Tokens, c: LossConfig) -> Tensor:
    loss = _clipped(t.r, t, c)
    if c.dual_clip is None:
        return loss
    return torch.where(t.advantage < 0, torch.minimum(loss, -c.dual_clip * t.advantage), loss)


def _gspo_ratio(t: Tokens) -> Tensor:
    return t.sequence_mean(t.logpi - t.logmu).exp()


def _mask_drpo(t: Tokens, c: LossConfig) -> Tensor:
    m = _mask_bound(t, c, t.advantage >= 0)
    penalty = ((t.pi - t.mu) ** 2 - m**2).clamp(min=0) / (2 * c.delta * t.mu)
    return -t.advantage * t.r + t.advantage.abs() * penalty


def _dppo(divergence: Callable[[Tokens], Tensor], change: Callable[[Tokens], Tensor]) -> Loss:
    def value(t: Tokens, c: LossConfig) -> Tensor:
        is_up = change(t).detach() > 0
        bound = _mask_bound(t, c, is_up)
        is_diverging = torch.where(is_up, t.advantage > 0, t.advantage < 0)
        mask = (~(is_diverging & (divergence(t).detach() > bound))).double()
        ratio = t.r.detach() if c.ratio_cap is None else t.r.detach().clamp(max=c.ratio_cap)
        return -t.advantage * ratio * mask * t.logpi

    return value


def _from_anchor(t: Tokens) -> Tensor:
    return t.pi - t.mu


def _from_rollout(t: Tokens) -> Tensor:
    return t.pi - t.rollout.exp()


LOSSES: dict[str, Loss] = {
    "surrogate": lambda t, _: -t.advantage * t.r,
    "drpo": lambda t, c: -t.advantage * t.r + t.advantage.abs() * t.mu * (t.r - 1) ** 2 / (2 * c.delta),
    "drpo_unweighted": lambda t, c: -t.advantage * t.r + t.mu * (t.r - 1) ** 2 / (2 * c.delta),
    "mask_drpo": _mask_drpo,
    "spo": lambda t, c: -t.advantage * t.r + t.advantage.abs() * (t.r - 1) ** 2 / (2 * c.epsilon),
    "spo_unweighted": lambda t, c: -t.advantage * t.r + (t.r - 1) ** 2 / (2 * c.epsilon),
    "dppo_binary_tv": _dppo(lambda t: (t.pi - t.mu).abs(), _from_anchor),
    "dppo_binary_kl": _dppo(_kl_binary, _from_anchor),
    "dppo_topk_tv": _dppo(_tv_topk, _from_rollout),
    "dppo_topk_kl": _dppo(_kl_topk, _from_rollout),
    "grpo": _grpo,
    "gspo": lambda t, c: _clipped(_gspo_ratio(t) * t.pi / t.pi.detach(), t, c),
    "cispo": lambda t, c: -t.r.detach().clamp(1 - c.clip_low, 1 + c.clip_high) * t.advantage * t.logpi,
}
"""Value per token. The ratio is never clamped: the data stays below every clamp."""


def _ratio_excess(ratio: Tensor, c: LossConfig) -> Tensor:
    return torch.maximum(ratio - 1 - c.clip_high, 1 - c.clip_low - ratio)


def _mask_excess(divergence: Callable[[Tokens], Tensor], change: Callable[[Tokens], Tensor]) -> Loss:
    return lambda t, c: divergence(t) - _mask_bound(t, c, change(t) > 0)


EXCESS: dict[str, Loss] = {
    "surrogate": lambda t, _: -torch.ones_like(t.pi),
    "drpo": lambda t, c: (t.pi - t.mu).abs() - c.delta,
    "drpo_unweighted": lambda t, c: (t.pi - t.mu).abs() - c.delta * t.advantage.abs(),
    "mask_drpo": lambda t, c: (t.pi - t.mu).abs() - _mask_bound(t, c, t.advantage >= 0),
    "spo": lambda t, c: (t.r - 1).abs() - c.epsilon,
    "spo_unweighted": lambda t, c: (t.r - 1).abs() - c.epsilon * t.advantage.abs(),
    "dppo_binary_tv": _mask_excess(lambda t: (t.pi - t.mu).abs(), _from_anchor),
    "dppo_binary_kl": _mask_excess(_kl_binary, _from_anchor),
    "dppo_topk_tv": _mask_excess(_tv_topk, _from_rollout),
    "dppo_topk_kl": _mask_excess(_kl_topk, _from_rollout),
    "grpo": lambda t, c: _ratio_excess(t.r, c),
    "gspo": lambda t, c: _ratio_excess(_gspo_ratio(t), c),
    "cispo": lambda t, c: _ratio_excess(t.r, c),
}
"""How far beyond the loss's bound a token is; negative inside. Its absolute value is the margin."""


# ------------------------------------------------------------------------- corrections, KL, the whole


def rho(t: Tokens, anchor: Anchor) -> Tensor:
    """old / mu, or pi / mu where the anchor is mu."""
    return ((t.logmu if anchor is Anchor.recomputed else t.logpi.detach()) - t.rollout).exp()


def geometric_rho(t: Tokens, anchor: Anchor) -> Tensor:
    """Over each token's sequence."""
    return t.sequence_mean(rho(t, anchor).log()).exp()


def drift(t: Tokens) -> Tensor:
    """mean(logmu - logpi) over each token's sequence."""
    return t.sequence_mean((t.logmu - t.logpi).detach())


def factor(t: Tokens, c: CorrectionConfig, anchor: Anchor) -> Tensor:
    """The product of the corrections, a constant."""
    rho_ = rho(t, anchor)
    kept = rho_ if anchor is Anchor.recomputed else torch.ones_like(rho_)
    match c.token:
        case TokenCorrection.none:
            result = torch.ones_like(rho_)
        case TokenCorrection.tis:
            result = rho_.clamp(max=c.token_high)
        case TokenCorrection.mis:
            result = torch.where(rho_ <= c.token_high, kept, 0.0)
        case TokenCorrection.icepop:
            result = torch.where((rho_ >= c.token_low) & (rho_ <= c.token_high), kept, 0.0)
    if c.sequence_low is not None:
        result = torch.where(geometric_rho(t, anchor) < c.sequence_low, 0.0, result)
    if c.sequence_high is not None:
        result = torch.where(geometric_rho(t, anchor) > c.sequence_high, 0.0, result)
    if c.opsm_delta is not None:
        result = torch.where((t.advantage < 0) & (drift(t) > c.opsm_delta), 0.0, result)
    return result


def has_corrections(c: CorrectionConfig) -> bool:
    """Whether any is switched on."""
    bounds = (c.sequence_low, c.sequence_high, c.opsm_delta)
    return c.token is not TokenCorrection.none or any(bound is not None for bound in bounds)


def kl_estimate(t: Tokens, estimator: KlEstimator) -> Tensor:
    """Of KL(pi || ref)."""
    x = t.logpi - t.logref
    return {KlEstimator.k1: x, KlEstimator.k2: x**2 / 2, KlEstimator.k3: (-x).exp() - 1 + x}[estimator]


def token_values(t: Tokens, algorithm: AlgorithmConfig) -> Tensor:
    """[N]: what is summed up."""
    value = LOSSES[algorithm.loss.name](t, algorithm.loss) * factor(t, algorithm.correction, algorithm.anchor)
    penalty = algorithm.kl.coef * kl_estimate(t, algorithm.kl.estimator)
    return value + penalty - algorithm.entropy_coef * t.entropy


def aggregate(values: Tensor, t: Tokens, algorithm: AlgorithmConfig) -> Tensor:
    """One number for the global batch."""
    if algorithm.aggregation is Aggregation.token_mean:
        return values.mean()
    parts = [values[t.sequence == number] for number in t.sequence.unique()]
    if algorithm.aggregation is Aggregation.sequence_mean_token_mean:
        return torch.stack([part.mean() for part in parts]).mean()
    assert algorithm.horizon_tokens is not None
    return torch.stack([part.sum() / algorithm.horizon_tokens for part in parts]).mean()
