"""DRPO against numbers worked out by hand and against the closed form in probabilities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.drpo import DrpoLoss, DrpoUnweightedLoss
from megatron_drpo.losses.tokens import LossTokens


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
def test_hand_computed_values(
    pi: float,
    mu: float,
    advantage: float,
    value: float,
    weight: float,
    make_tokens: Callable[..., LossTokens],
) -> None:
    tokens = make_tokens([pi], [mu], [advantage])
    loss = DrpoLoss.from_config(LossConfig(delta=0.1))
    assert loss.value(tokens).item() == pytest.approx(value, abs=1e-12)
    assert loss.weight(tokens).item() == pytest.approx(weight, abs=1e-12)


def test_weight_is_the_papers_closed_form(loss_grid: LossTokens) -> None:
    pi, mu, advantages = loss_grid.logprobs_N.exp(), loss_grid.anchor_logprobs_N.exp(), loss_grid.advantages_N
    sign = torch.sign(advantages * (pi / mu - 1))
    expected = 1 - sign * (pi - mu).abs() / 0.1
    torch.testing.assert_close(DrpoLoss(delta=0.1).weight(loss_grid), expected, rtol=1e-12, atol=1e-12)


def test_outside_means_further_than_delta(make_tokens: Callable[..., LossTokens]) -> None:
    tokens = make_tokens([0.3, 0.3, 0.1, 0.2], [0.21, 0.19, 0.21, 0.2], [1.0, -1.0, 1.0, 0.0])
    assert DrpoLoss(delta=0.1).outside_trust_region(tokens).tolist() == [False, True, True, False]


def test_a_delta_that_never_binds_is_named() -> None:
    assert DrpoLoss(delta=0.99).warnings() == []
    (warning,) = DrpoLoss(delta=12.5).warnings()
    assert "algorithm.loss.delta=12.5" in warning
    assert "0.92 .. 1.08" in warning


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "value", "gradient"),
    [
        (0.2, 0.2, 1.0, -1.0, -1.0),
        (0.3, 0.2, 1.0, -1.25, 0.0),  # |pi - mu| = |A| delta
        (0.3, 0.2, 2.0, -2.75, -1.5),  # half of it
        (0.3, 0.2, 0.5, -0.5, 0.75),  # twice
        (0.3, 0.2, 0.0, 0.25, 1.5),  # no advantage: back to mu
        (0.1, 0.2, 0.0, 0.25, -0.5),
    ],
)
def test_hand_computed_values_without_the_advantage(
    pi: float,
    mu: float,
    advantage: float,
    value: float,
    gradient: float,
    make_tokens: Callable[..., LossTokens],
) -> None:
    tokens = make_tokens([pi], [mu], [advantage])
    loss = DrpoUnweightedLoss.from_config(LossConfig(delta=0.1))
    assert loss.value(tokens).item() == pytest.approx(value, abs=1e-12)
    assert loss.logprob_gradient(tokens).item() == pytest.approx(gradient, abs=1e-12)


def test_unweighted_equals_drpo_where_the_advantage_is_one(loss_grid: LossTokens) -> None:
    tokens = loss_grid
    tokens.advantages_N.copy_(tokens.advantages_N.sign())
    used = tokens.advantages_N != 0
    drpo, unweighted = DrpoLoss(delta=0.1), DrpoUnweightedLoss(delta=0.1)
    scale = tokens.ratio_N * (1 + tokens.difference_N.abs() / 0.1)
    for name in ("value", "logprob_gradient"):
        difference = getattr(drpo, name)(tokens) - getattr(unweighted, name)(tokens)
        assert (difference.abs() <= 1e-12 * scale)[used].all()
    torch.testing.assert_close(unweighted.weight(tokens)[used], drpo.weight(tokens)[used])
    outside = unweighted.outside_trust_region(tokens)
    assert torch.equal(outside[used], drpo.outside_trust_region(tokens)[used])


def test_bound_of_the_unweighted_loss_shrinks_with_the_advantage(
    make_tokens: Callable[..., LossTokens],
) -> None:
    tokens = make_tokens([0.3, 0.3, 0.3, 0.2], [0.2, 0.2, 0.2, 0.2], [1.1, -0.9, 0.0, 0.0])
    loss = DrpoUnweightedLoss(delta=0.1)
    assert loss.outside_trust_region(tokens).tolist() == [False, True, True, False]
    assert loss.warnings() == []
    (warning,) = DrpoUnweightedLoss(delta=12.5).warnings()
    assert "algorithm.loss.delta=12.5" in warning
    assert "|A| < 0.08" in warning
