"""Losses as gradient weights: one file per family, the registry, corrections, the aggregation. All pure."""

from megatron_drpo.losses.aggregation import compute_token_weights, count_loss
from megatron_drpo.losses.base import Loss, RatioLoss
from megatron_drpo.losses.corrections import Correction, build_corrections
from megatron_drpo.losses.kl import KlPenalty, build_kl_penalty
from megatron_drpo.losses.objective import Objective, build_objective
from megatron_drpo.losses.registry import LOSSES, build_loss, check_loss
from megatron_drpo.losses.sft import SftLoss
from megatron_drpo.losses.tokens import LossTokens, Sequences, TopK

__all__ = [
    "LOSSES",
    "Correction",
    "KlPenalty",
    "Loss",
    "LossTokens",
    "Objective",
    "RatioLoss",
    "Sequences",
    "SftLoss",
    "TopK",
    "build_corrections",
    "build_kl_penalty",
    "build_loss",
    "build_objective",
    "check_loss",
    "compute_token_weights",
    "count_loss",
]
