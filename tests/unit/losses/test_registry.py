"""From configuration to loss."""

from __future__ import annotations

import pytest

from megatron_drpo.config import LossConfig
from megatron_drpo.errors import ConfigError
from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.losses.grpo import GrpoLoss
from megatron_drpo.losses.registry import LOSSES, build_loss, check_loss
from megatron_drpo.losses.surrogate import SurrogateLoss


def test_each_name_builds_its_loss_from_its_own_keys() -> None:
    config = LossConfig(delta=0.07, clip_low=0.1, clip_high=0.3, dual_clip=2.5)
    expected = {
        "drpo": DrpoLoss(delta=0.07),
        "surrogate": SurrogateLoss(),
        "grpo": GrpoLoss(clip_low=0.1, clip_high=0.3, dual_clip=2.5),
    }
    assert set(LOSSES) == set(expected)
    for name, loss in expected.items():
        config.name = name
        assert check_loss(config) == []
        assert build_loss(config) == loss


def test_an_unknown_name_lists_the_known_ones() -> None:
    config = LossConfig(name="drp0")
    (problem,) = check_loss(config)
    assert problem == "algorithm.loss.name=drp0: unknown loss; known are drpo, surrogate, grpo"
    with pytest.raises(ConfigError, match="known are drpo, surrogate, grpo"):
        build_loss(config)
