"""CISPO: the coefficient is clipped, the gradient never vanishes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.cispo import CispoLoss
from megatron_drpo.losses.tokens import LossTokens


def test_by_hand(make_tokens: Callable[..., LossTokens]) -> None:
    loss = CispoLoss.from_config(LossConfig(clip_low=0.2, clip_high=0.3))
    tokens = make_tokens([0.4, 0.1, 0.22, 0.22], [0.2] * 4, [2.0, 1.0, -1.0, 0.0])
    assert loss.logprob_gradient(tokens).tolist() == pytest.approx([-2.6, -0.8, 1.1, 0.0])
    expected = [-2.6 * math.log(0.4), -0.8 * math.log(0.1), 1.1 * math.log(0.22), 0.0]
    assert loss.value(tokens).tolist() == pytest.approx(expected)
    assert loss.weight(tokens).tolist() == pytest.approx([0.65, 1.6, 1.0, 0.0])  # clip(r) / r
    assert loss.outside_trust_region(tokens).tolist() == [True, True, False, False]
    assert loss.warnings() == []


def test_coefficient_over_the_grid(loss_grid: LossTokens) -> None:
    """In probabilities, and bounded also where the log-ratio is beyond its clamp."""
    ratio = loss_grid.logprobs_N.exp() / loss_grid.anchor_logprobs_N.exp()
    expected = -loss_grid.advantages_N * ratio.clamp(0.8, 1.3)
    loss = CispoLoss(clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(loss.logprob_gradient(loss_grid), expected, rtol=1e-12, atol=0)
    faulty = loss_grid.with_logprobs(loss_grid.anchor_logprobs_N + 100)
    torch.testing.assert_close(loss.logprob_gradient(faulty), -1.3 * loss_grid.advantages_N)
