"""The ratio and its clamp, for every loss at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_drpo.losses.base import LOG_RATIO_MAX, Loss, compute_ratio, compute_unclamped
from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.losses.grpo import GrpoLoss
from megatron_drpo.losses.surrogate import SurrogateLoss

LOSSES: list[Loss] = [
    DrpoLoss(delta=0.1),
    SurrogateLoss(),
    GrpoLoss(clip_low=0.2, clip_high=0.3, dual_clip=None),
    GrpoLoss(clip_low=0.2, clip_high=0.3, dual_clip=3.0),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_weight_is_the_gradient_of_the_value(
    loss: Loss,
    dtype: torch.dtype,
    tolerance: float,
    loss_grid: tuple[Tensor, Tensor, Tensor],
    assert_weight_is_gradient: Callable[[Loss, Tensor, Tensor, Tensor, float], None],
) -> None:
    logpi, logmu, advantages = (tensor.to(dtype) for tensor in loss_grid)
    assert_weight_is_gradient(loss, logpi, logmu, advantages, tolerance)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_ratio", [LOG_RATIO_MAX - 1, LOG_RATIO_MAX, LOG_RATIO_MAX + 1, 300.0, -300.0])
def test_weight_is_the_gradient_at_and_beyond_the_clamp(
    loss: Loss,
    dtype: torch.dtype,
    log_ratio: float,
    assert_weight_is_gradient: Callable[[Loss, Tensor, Tensor, Tensor, float], None],
) -> None:
    logpi = torch.full((3,), min(0.0, log_ratio), dtype=dtype)
    logmu = logpi - log_ratio
    advantages = torch.tensor([-1.0, 0.0, 2.0], dtype=dtype)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    assert_weight_is_gradient(loss, logpi, logmu, advantages, tolerance)
    if log_ratio > LOG_RATIO_MAX:
        assert (loss.weight(logpi, logmu, advantages) == 0).all()


def test_ratio_is_exact_for_every_probability_down_to_1e_12() -> None:
    mu = torch.tensor([1e-12, 1e-6, 0.5, 1.0], dtype=torch.float64)
    pi = torch.tensor([1.0, 0.25, 0.5, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(compute_ratio(pi.log(), mu.log()), pi / mu, rtol=1e-12, atol=0)
    assert compute_unclamped(pi.log(), mu.log()).all()


logprob = st.floats(min_value=-2e4, max_value=0, width=32)


@given(logpi=logprob, logmu=logprob, advantage=st.floats(min_value=-100, max_value=100, width=32))
def test_nothing_overflows_in_float32(logpi: float, logmu: float, advantage: float) -> None:
    for loss in LOSSES:
        policy = torch.tensor([logpi], requires_grad=True)
        behaviour, advantages = torch.tensor([logmu]), torch.tensor([advantage])
        value = loss.value(policy, behaviour, advantages)
        (gradient,) = torch.autograd.grad(value.sum(), policy)
        for tensor in (value, gradient, loss.weight(policy, behaviour, advantages)):
            assert torch.isfinite(tensor).all()
        assert torch.isfinite(gradient.square()).all()
