"""Corrections for the mismatch between trainer and rollout engine: factors on the loss of a token.

rho = old / mu    anchor=recomputed: the trainer's own probability before the update over the engine's
rho = pi / mu     anchor=rollout, without a gradient; the loss's r contains it already, so that what is
                  left of "rho or 0" is the mask, "1 or 0"
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_drpo.config.schema import Anchor, CorrectionConfig, TokenCorrection
from megatron_drpo.losses.tokens import LossTokens


class Correction(ABC):
    """One factor per token. Factors are independent of each other and are multiplied; all are pure."""

    name: ClassVar[str]
    """Of its metrics."""
    needs_sequences: ClassVar[bool] = False
    """Whether a token's factor depends on its whole sequence."""

    @abstractmethod
    def factor(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        """Without a gradient; 0: the token contributes nothing. A rho that is NaN is masked by the masks."""


@dataclass(frozen=True, kw_only=True)
class TruncatedImportanceSampling(Correction):
    """min(rho, high): TIS (https://fengyao.notion.site/off-policy-rl)."""

    name: ClassVar[str] = "tis"

    high: float
    anchor: Anchor

    @torch.no_grad()
    def factor(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return _log_rho(tokens, self.anchor).exp().clamp(max=self.high)


@dataclass(frozen=True, kw_only=True)
class MaskedImportanceSampling(Correction):
    """rho where rho <= high, else 0: MIS per token, truncation replaced by a mask ("When Speed Kills
    Stability", https://yingru.notion.site, 2025)."""

    name: ClassVar[str] = "mis"

    high: float
    anchor: Anchor

    @torch.no_grad()
    def factor(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return _rho_inside(tokens, self.anchor, 0.0, self.high)


@dataclass(frozen=True, kw_only=True)
class IcePop(Correction):
    """rho where low <= rho <= high, else 0: masked on both sides (arXiv 2510.18855; theirs are 0.5 and 5)."""

    name: ClassVar[str] = "icepop"

    low: float
    high: float
    anchor: Anchor

    @torch.no_grad()
    def factor(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        return _rho_inside(tokens, self.anchor, self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class SequenceMask(Correction):
    """1 where low <= exp(mean of log rho over the sequence's loss tokens) <= high, else 0: the geometric
    mean, which does not shrink or grow with the length as the sequence's own ratio does."""

    name: ClassVar[str] = "sequence_mask"
    needs_sequences: ClassVar[bool] = True

    low: float | None
    high: float | None
    anchor: Anchor

    @torch.no_grad()
    def factor(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        mean_N = tokens.mean_over_sequence(_log_rho(tokens, self.anchor)).exp()
        is_kept_N = ~mean_N.isnan()
        if self.low is not None:
            is_kept_N &= mean_N >= self.low
        if self.high is not None:
            is_kept_N &= mean_N <= self.high
        return is_kept_N.to(mean_N.dtype)


@dataclass(frozen=True, kw_only=True)
class OffPolicySequenceMask(Correction):
    """0 where A < 0 and mean(logmu - logpi) over the sequence's loss tokens exceeds delta, else 1: OPSM of
    DeepSeek-V3.2 (arXiv 2512.02556), between the current policy and the anchor."""

    name: ClassVar[str] = "opsm"
    needs_sequences: ClassVar[bool] = True

    delta: float

    @torch.no_grad()
    def factor(self, tokens: LossTokens) -> Float[Tensor, " N"]:
        drift_N = tokens.mean_over_sequence(tokens.anchor_logprobs_N - tokens.logprobs_N)
        is_masked_N = (tokens.advantages_N < 0) & (drift_N > self.delta)
        return (~is_masked_N).to(drift_N.dtype)


def build_corrections(config: CorrectionConfig, anchor: Anchor) -> tuple[Correction, ...]:
    """Those that the configuration switches on."""
    corrections: list[Correction] = []
    match config.token:
        case TokenCorrection.tis:
            corrections.append(TruncatedImportanceSampling(high=config.token_high, anchor=anchor))
        case TokenCorrection.mis:
            corrections.append(MaskedImportanceSampling(high=config.token_high, anchor=anchor))
        case TokenCorrection.icepop:
            corrections.append(IcePop(low=config.token_low, high=config.token_high, anchor=anchor))
        case TokenCorrection.none:
            pass
    if config.sequence_low is not None or config.sequence_high is not None:
        corrections.append(SequenceMask(low=config.sequence_low, high=config.sequence_high, anchor=anchor))
    if config.opsm_delta is not None:
        corrections.append(OffPolicySequenceMask(delta=config.opsm_delta))
    return tuple(corrections)


def _log_rho(tokens: LossTokens, anchor: Anchor) -> Float[Tensor, " N"]:
    trainer_N = tokens.anchor_logprobs_N if anchor is Anchor.recomputed else tokens.logprobs_N
    return trainer_N - tokens.rollout_logprobs_N


def _rho_inside(tokens: LossTokens, anchor: Anchor, low: float, high: float) -> Float[Tensor, " N"]:
    rho_N = _log_rho(tokens, anchor).exp()
    is_inside_N = (rho_N >= low) & (rho_N <= high)
    kept_N = rho_N if anchor is Anchor.recomputed else torch.ones_like(rho_N)
    return torch.where(is_inside_N, kept_N, torch.zeros_like(rho_N))
