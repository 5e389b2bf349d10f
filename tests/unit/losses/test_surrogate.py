"""The plain surrogate."""

from __future__ import annotations

import torch

from megatron_drpo.config import LossConfig
from megatron_drpo.losses.surrogate import SurrogateLoss


def test_value_is_minus_advantage_times_ratio_and_nothing_is_outside() -> None:
    loss = SurrogateLoss.from_config(LossConfig())
    pi, mu = torch.tensor([0.5, 0.2], dtype=torch.float64), torch.tensor([0.25, 0.4], dtype=torch.float64)
    advantages = torch.tensor([3.0, -1.0], dtype=torch.float64)
    value = loss.value(pi.log(), mu.log(), advantages)
    torch.testing.assert_close(value, torch.tensor([-6.0, 0.5], dtype=torch.float64))
    assert loss.weight(pi.log(), mu.log(), advantages).tolist() == [1.0, 1.0]
    assert not loss.outside_trust_region(pi.log(), mu.log()).any()
    assert loss.warnings() == []
