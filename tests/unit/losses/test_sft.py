"""Maximum likelihood."""

from __future__ import annotations

import torch

from megatron_drpo.losses.sft import SftLoss
from megatron_drpo.losses.tokens import LossTokens


def test_value_gradient_and_reported_weight() -> None:
    loss = SftLoss()
    logpi = torch.tensor([-0.5, -40.0], dtype=torch.float64, requires_grad=True)
    unread = torch.full((2,), torch.nan, dtype=torch.float64)
    tokens = LossTokens(
        logprobs_N=logpi, anchor_logprobs_N=unread, rollout_logprobs_N=unread, advantages_N=unread
    )
    value = loss.value(tokens)
    assert value.tolist() == [0.5, 40.0]
    (gradient,) = torch.autograd.grad(value.sum(), logpi)
    assert gradient.tolist() == loss.logprob_gradient(tokens).tolist() == [-1.0, -1.0]
    assert loss.weight(tokens).tolist() == [1.0, 1.0]
    assert not loss.has_trust_region
    assert not loss.outside_trust_region(tokens).any()
