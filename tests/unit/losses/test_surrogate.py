"""The plain surrogate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.surrogate import SurrogateLoss
from megatron_drpo.losses.tokens import LossTokens


def test_value_is_minus_advantage_times_ratio_and_nothing_is_outside(
    make_tokens: Callable[..., LossTokens],
) -> None:
    loss = SurrogateLoss.from_config(LossConfig())
    tokens = make_tokens([0.5, 0.2], [0.25, 0.4], [3.0, -1.0])
    torch.testing.assert_close(loss.value(tokens), torch.tensor([-6.0, 0.5], dtype=torch.float64))
    assert loss.weight(tokens).tolist() == [1.0, 1.0]
    assert not loss.has_trust_region
    assert not loss.outside_trust_region(tokens).any()
    assert loss.warnings() == []


def test_over_the_grid(loss_grid: LossTokens) -> None:
    expected = -loss_grid.advantages_N * loss_grid.logprobs_N.exp() / loss_grid.anchor_logprobs_N.exp()
    torch.testing.assert_close(SurrogateLoss().value(loss_grid), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(SurrogateLoss().logprob_gradient(loss_grid), expected, rtol=1e-12, atol=0)
