"""Mask-DRPO: the surrogate inside the boundary, DRPO outside, and one continuous loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.losses.mask_drpo import MaskDrpoLoss
from megatron_drpo.losses.surrogate import SurrogateLoss
from megatron_drpo.losses.tokens import LossTokens


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "value", "weight"),
    [
        (0.2, 0.2, 1.0, -1.0, 1.0),
        (0.3, 0.2, 1.0, -1.5, 1.0),  # 0.1 < mask_high
        (0.4, 0.2, 1.0, -2.0 + (0.04 - 0.0225) / 0.04, -1.0),  # outside: 1 - 0.2 / 0.1
        (0.4, 0.2, -1.0, 2.0 + (0.04 - 0.0025) / 0.04, 3.0),  # outside and moving back: 1 + 0.2 / 0.1
        (0.14, 0.2, -2.0, 1.4 + 2 * (0.0036 - 0.0025) / 0.04, 0.4),  # 0.06 > mask_low
        (0.16, 0.2, -2.0, 1.6, 1.0),  # 0.04 < mask_low
        (0.9, 0.2, 0.0, 0.0, 1.0 - 0.0),
    ],
)
def test_hand_computed_values(
    pi: float,
    mu: float,
    advantage: float,
    value: float,
    weight: float,
    make_tokens: Callable[..., LossTokens],
) -> None:
    loss = MaskDrpoLoss.from_config(LossConfig(delta=0.1, mask_high=0.15, mask_low=0.05))
    tokens = make_tokens([pi], [mu], [advantage])
    assert loss.value(tokens).item() == pytest.approx(value, abs=1e-12)
    assert loss.weight(tokens).item() == pytest.approx(weight, abs=1e-12)


def test_weight_is_piecewise_over_the_grid(loss_grid: LossTokens) -> None:
    loss = MaskDrpoLoss(delta=0.1, mask_high=0.13, mask_low=0.07)
    pi, mu, a = loss_grid.logprobs_N.exp(), loss_grid.anchor_logprobs_N.exp(), loss_grid.advantages_N
    inside = torch.where(a < 0, (pi - mu).abs() <= 0.07, (pi - mu).abs() <= 0.13)
    drpo = 1 - torch.sign(a * (pi - mu)) * (pi - mu).abs() / 0.1
    expected = torch.where(inside, torch.ones_like(drpo), drpo)
    torch.testing.assert_close(loss.weight(loss_grid), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(loss.outside_trust_region(loss_grid), ~inside)


@pytest.mark.parametrize("mu", [1e-9, 0.2, 0.6])
@pytest.mark.parametrize("advantage", [-1.0, 2.0])
def test_value_is_continuous_and_its_slope_is_the_weight(
    mu: float, advantage: float, make_tokens: Callable[..., LossTokens]
) -> None:
    """Central differences in logpi, across the boundary and on both sides of it."""
    loss = MaskDrpoLoss(delta=0.1, mask_high=0.15, mask_low=0.15)
    pi = [mu + 0.15 + shift for shift in (-0.05, -1e-9, 1e-9, 0.05, 0.2)]
    tokens = make_tokens(pi, [mu] * 5, [advantage] * 5)
    value = loss.value(tokens)
    assert abs(value[2] - value[1]).item() <= 1e-7 / mu  # no jump: only slope times distance
    step = 1e-6
    higher = loss.value(tokens.with_logprobs(tokens.logprobs_N + step))
    lower = loss.value(tokens.with_logprobs(tokens.logprobs_N - step))
    slope = (higher - lower) / (2 * step)
    for i in (0, 3, 4):
        assert slope[i].item() == pytest.approx(loss.logprob_gradient(tokens)[i].item(), rel=1e-6)


def test_a_boundary_at_0_is_drpo_and_a_boundary_at_1_the_surrogate(loss_grid: LossTokens) -> None:
    without = MaskDrpoLoss(delta=0.1, mask_high=1e-300, mask_low=1e-300)
    torch.testing.assert_close(
        without.value(loss_grid), DrpoLoss(delta=0.1).value(loss_grid), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(without.weight(loss_grid), DrpoLoss(delta=0.1).weight(loss_grid))
    within = MaskDrpoLoss(delta=0.1, mask_high=1.0, mask_low=1.0)
    torch.testing.assert_close(within.value(loss_grid), SurrogateLoss().value(loss_grid), rtol=1e-12, atol=0)
    assert (within.weight(loss_grid) == 1).all()


def test_bounds_that_never_bind_are_named() -> None:
    assert MaskDrpoLoss(delta=0.1, mask_high=0.15, mask_low=1.0).warnings() == []
    delta, mask = MaskDrpoLoss.from_config(LossConfig(delta=12.5, mask_high=1.0)).warnings()
    assert "algorithm.loss.delta=12.5" in delta
    assert "algorithm.loss.mask_high=1.0, mask_low=1.0" in mask
