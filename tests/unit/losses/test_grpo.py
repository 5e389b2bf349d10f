"""The clipped ratio against PPO's formula, written out per token in Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_drpo.config import LossConfig
from megatron_drpo.losses.grpo import GrpoLoss


def _ppo(ratio: float, advantage: float, low: float, high: float, dual_clip: float | None) -> float:
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-advantage * ratio, -advantage * clipped)
    if dual_clip is not None and advantage < 0:
        loss = min(loss, -advantage * dual_clip)
    return loss


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_value_is_ppos(dual_clip: float | None, loss_grid: tuple[Tensor, Tensor, Tensor]) -> None:
    loss = GrpoLoss.from_config(LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip))
    logpi, logmu, advantages = loss_grid
    ratios = (logpi - logmu).exp().tolist()
    expected = [_ppo(r, a, 0.2, 0.28, dual_clip) for r, a in zip(ratios, advantages.tolist(), strict=True)]
    value = loss.value(logpi, logmu, advantages)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_weight_is_zero_only_where_the_clip_acts() -> None:
    loss = GrpoLoss(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    ratio = torch.tensor([1.27, 1.29, 0.5, 0.81, 0.79, 2.9, 3.1, 9.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 0.0], dtype=torch.float64)
    logmu = torch.full_like(ratio, -5.0)
    weight = loss.weight(logmu + ratio.log(), logmu, advantages)
    assert weight.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    outside = loss.outside_trust_region(logmu + ratio.log(), logmu)
    assert outside.tolist() == [False, True, True, False, True, True, True, True]


def test_a_ratio_on_a_bound_keeps_its_whole_gradient() -> None:
    loss = GrpoLoss(clip_low=0.5, clip_high=1.0, dual_clip=4.0)  # bounds with exact logarithms in base 2
    logpi = torch.tensor([2.0, 0.5, 4.0], dtype=torch.float64).log().requires_grad_()
    logmu, advantages = (
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64),
    )
    (gradient,) = torch.autograd.grad(loss.value(logpi, logmu, advantages).sum(), logpi)
    weight = loss.weight(logpi, logmu, advantages)
    torch.testing.assert_close(gradient, -advantages * logpi.detach().exp() * weight, rtol=1e-15, atol=0)
