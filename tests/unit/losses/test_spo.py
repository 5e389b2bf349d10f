"""SPO against numbers worked out by hand and against the closed form in probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.spo import SPO_LOG_RATIO_MAX, SpoLoss, SpoUnweightedLoss
from megatron_drpo.losses.tokens import LossTokens


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "value", "weight"),
    [
        (0.2, 0.2, 1.0, -1.0, 1.0),
        (0.24, 0.2, 1.0, -1.2 + 0.04 / 0.4, 0.0),  # |r - 1| = epsilon
        (0.3, 0.2, 1.0, -1.5 + 0.25 / 0.4, -1.5),
        (0.3, 0.2, -2.0, 3.0 + 2 * 0.25 / 0.4, 3.5),
        (0.18, 0.2, -2.0, 1.8 + 2 * 0.01 / 0.4, 0.5),
        (3e-9, 2e-9, 1.0, -1.5 + 0.25 / 0.4, -1.5),  # the ratio alone counts
        (0.9, 0.2, 0.0, 0.0, 1.0),
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
    tokens = make_tokens([pi], [mu], [advantage])
    loss = SpoLoss.from_config(LossConfig(epsilon=0.2))
    assert loss.value(tokens).item() == pytest.approx(value, abs=1e-12)
    assert loss.weight(tokens).item() == pytest.approx(weight, abs=1e-12)


def test_weight_is_the_closed_form_below_the_clamp_and_0_above(loss_grid: LossTokens) -> None:
    pi, mu, a = loss_grid.logprobs_N.exp(), loss_grid.anchor_logprobs_N.exp(), loss_grid.advantages_N
    ratio = pi / mu
    expected = 1 - torch.sign(a * (ratio - 1)) * (ratio - 1).abs() / 0.2
    expected = torch.where(ratio <= math.exp(20), expected, torch.zeros_like(ratio))
    assert (ratio > math.exp(20)).any()
    torch.testing.assert_close(SpoLoss(epsilon=0.2).weight(loss_grid), expected, rtol=1e-12, atol=1e-12)
    gradient = ratio * ((ratio - 1) / 0.2 - a) * (ratio <= math.exp(20))
    unweighted = SpoUnweightedLoss(epsilon=0.2).logprob_gradient(loss_grid)
    torch.testing.assert_close(unweighted, gradient, rtol=1e-9, atol=1e-14)


def test_value_is_held_at_the_clamp(make_tokens: Callable[..., LossTokens]) -> None:
    tokens = make_tokens([1.0, 1.0], [math.exp(-20), 1e-12], [-1.0, -1.0])
    value = SpoLoss(epsilon=0.2).value(tokens)
    ratio = math.exp(SPO_LOG_RATIO_MAX)
    assert value.tolist() == pytest.approx([ratio + (ratio - 1) ** 2 / 0.4] * 2, rel=1e-12)


def test_unweighted_by_hand(make_tokens: Callable[..., LossTokens]) -> None:
    tokens = make_tokens([0.24, 0.3, 0.3, 0.1], [0.2] * 4, [1.0, 5.0, 0.0, -1.0])
    loss = SpoUnweightedLoss.from_config(LossConfig(epsilon=0.2))
    assert loss.value(tokens).tolist() == pytest.approx([-1.1, -6.875, 0.625, 1.125], abs=1e-12)
    assert loss.logprob_gradient(tokens).tolist() == pytest.approx([0.0, -3.75, 3.75, -0.75], abs=1e-12)
    assert loss.weight(tokens).tolist() == pytest.approx([0.0, 0.5, 0.0, -1.5], abs=1e-12)
    assert loss.outside_trust_region(make_tokens([0.3] * 3, [0.2] * 3, [3.0, 2.0, 0.0])).tolist() == [
        False,
        True,
        True,
    ]


def test_outside_means_a_ratio_further_than_epsilon_from_1(make_tokens: Callable[..., LossTokens]) -> None:
    tokens = make_tokens([0.25, 0.23, 0.15, 2.5e-9], [0.2, 0.2, 0.2, 2e-9], [1.0, 1.0, 1.0, -1.0])
    assert SpoLoss(epsilon=0.2).outside_trust_region(tokens).tolist() == [True, False, True, True]


def test_an_epsilon_that_never_binds_is_named() -> None:
    assert SpoLoss(epsilon=0.9).warnings() == []
    assert SpoUnweightedLoss(epsilon=0.9).warnings() == []
    for loss in (SpoLoss(epsilon=12.5), SpoUnweightedLoss(epsilon=12.5)):
        (warning,) = loss.warnings()
        assert "algorithm.loss.epsilon=12.5" in warning
