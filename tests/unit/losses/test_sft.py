"""Maximum likelihood."""

from __future__ import annotations

import torch

from megatron_drpo.losses.sft import SftLoss


def test_value_gradient_and_reported_weight() -> None:
    loss = SftLoss()
    logpi = torch.tensor([-0.5, -40.0], dtype=torch.float64, requires_grad=True)
    unread = torch.full((2,), torch.nan, dtype=torch.float64)
    value = loss.value(logpi, unread, unread)
    assert value.tolist() == [0.5, 40.0]
    (gradient,) = torch.autograd.grad(value.sum(), logpi)
    assert gradient.tolist() == loss.logprob_gradient(logpi, unread, unread).tolist() == [-1.0, -1.0]
    assert loss.weight(logpi, unread, unread).tolist() == [1.0, 1.0]
