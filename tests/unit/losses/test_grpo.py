"""The clipped ratio against PPO's formula, written out per token in Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.grpo import GrpoLoss
from megatron_drpo.losses.tokens import LossTokens


def _ppo(ratio: float, advantage: float, low: float, high: float, dual_clip: float | None) -> float:
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-advantage * ratio, -advantage * clipped)
    if dual_clip is not None and advantage < 0:
        loss = min(loss, -advantage * dual_clip)
    return loss


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_value_is_ppos(dual_clip: float | None, loss_grid: LossTokens) -> None:
    loss = GrpoLoss.from_config(LossConfig(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip))
    ratios = (loss_grid.logprobs_N - loss_grid.anchor_logprobs_N).exp().tolist()
    advantages = loss_grid.advantages_N.tolist()
    expected = [_ppo(r, a, 0.2, 0.28, dual_clip) for r, a in zip(ratios, advantages, strict=True)]
    value = loss.value(loss_grid)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def _at_ratios(
    ratios: list[float], advantages: list[float], make_tokens: Callable[..., LossTokens]
) -> LossTokens:
    return make_tokens([0.01 * ratio for ratio in ratios], [0.01] * len(ratios), advantages)


def test_weight_is_zero_only_where_the_clip_acts(make_tokens: Callable[..., LossTokens]) -> None:
    loss = GrpoLoss(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    ratios = [1.27, 1.29, 0.5, 0.81, 0.79, 2.9, 3.1, 9.0]
    tokens = _at_ratios(ratios, [1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 0.0], make_tokens)
    assert loss.weight(tokens).tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    outside = loss.outside_trust_region(tokens)
    assert outside.tolist() == [False, True, True, False, True, True, True, True]


def test_a_ratio_on_a_bound_keeps_its_whole_gradient(make_tokens: Callable[..., LossTokens]) -> None:
    loss = GrpoLoss(clip_low=0.5, clip_high=1.0, dual_clip=4.0)  # bounds with exact logarithms in base 2
    tokens = make_tokens([2.0, 0.5, 4.0], [1.0] * 3, [1.0, -1.0, -1.0])
    logpi = tokens.logprobs_N.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss.value(tokens.with_logprobs(logpi)).sum(), logpi)
    expected = -tokens.advantages_N * torch.tensor([2.0, 0.5, 4.0], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(loss.logprob_gradient(tokens), expected, rtol=1e-15, atol=0)


def test_a_lower_clip_that_never_binds_is_named() -> None:
    assert GrpoLoss(clip_low=0.99, clip_high=0.2).warnings() == []
    (warning,) = GrpoLoss(clip_low=1.0, clip_high=0.2).warnings()
    assert "algorithm.loss.clip_low=1.0" in warning
