"""Losses as gradient weights: one file per family, the registry, the aggregation. Pure functions."""

from megatron_drpo.losses.aggregation import compute_token_weights, count_loss
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.registry import LOSSES, build_loss, check_loss
from megatron_drpo.losses.sft import SftLoss

__all__ = ["LOSSES", "Loss", "SftLoss", "build_loss", "check_loss", "compute_token_weights", "count_loss"]
