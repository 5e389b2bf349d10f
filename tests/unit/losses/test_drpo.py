"""DRPO against numbers worked out by hand and against the closed form in probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_drpo.config import LossConfig
from megatron_drpo.losses.drpo import DrpoLoss


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "value", "weight"),
    [
        (0.2, 0.2, 1.0, -1.0, 1.0),  # r = 1: the surrogate
        (0.3, 0.2, 1.0, -1.5 + 0.2 * 0.25 / 0.2, 0.0),  # |pi - mu| = delta: no gradient
        (0.4, 0.2, 1.0, -2.0 + 0.2 * 1.0 / 0.2, -1.0),  # beyond delta: the gradient turns
        (0.3, 0.2, -2.0, 3.0 + 2 * 0.2 * 0.25 / 0.2, 2.0),  # moving back: more weight
        (0.15, 0.2, -2.0, 1.5 + 2 * 0.2 * 0.0625 / 0.2, 0.5),
        (0.15, 0.2, 1.0, -0.75 + 0.2 * 0.0625 / 0.2, 1.5),
        (0.9, 0.2, 0.0, 0.0, 1.0),
    ],
)
def test_hand_computed_values(pi: float, mu: float, advantage: float, value: float, weight: float) -> None:
    arguments = [torch.tensor([x], dtype=torch.float64) for x in (pi, mu, advantage)]
    logpi, logmu, advantages = arguments[0].log(), arguments[1].log(), arguments[2]
    loss = DrpoLoss.from_config(LossConfig(delta=0.1))
    assert loss.value(logpi, logmu, advantages).item() == pytest.approx(value, abs=1e-12)
    assert loss.weight(logpi, logmu, advantages).item() == pytest.approx(weight, abs=1e-12)


def test_weight_is_the_papers_closed_form(loss_grid: tuple[Tensor, Tensor, Tensor]) -> None:
    logpi, logmu, advantages = loss_grid
    pi, mu = logpi.exp(), logmu.exp()
    sign = torch.sign(advantages * (pi / mu - 1))
    expected = 1 - sign * (pi - mu).abs() / 0.1
    torch.testing.assert_close(
        DrpoLoss(delta=0.1).weight(logpi, logmu, advantages), expected, rtol=1e-12, atol=1e-12
    )


def test_outside_means_further_than_delta() -> None:
    logpi, logmu = torch.tensor([0.3, 0.3, 0.1, 0.2]).log(), torch.tensor([0.21, 0.19, 0.21, 0.2]).log()
    assert DrpoLoss(delta=0.1).outside_trust_region(logpi, logmu).tolist() == [False, True, True, False]


def test_a_delta_that_never_binds_is_named() -> None:
    assert DrpoLoss(delta=0.99).warnings() == []
    (warning,) = DrpoLoss(delta=12.5).warnings()
    assert "algorithm.loss.delta=12.5" in warning
    assert "0.92 .. 1.08" in warning
