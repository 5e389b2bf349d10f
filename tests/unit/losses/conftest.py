"""A grid of probabilities and advantages, and the check that a loss's weight is its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_drpo.losses.base import Loss, compute_ratio


@pytest.fixture
def loss_grid() -> tuple[Tensor, Tensor, Tensor]:
    """float64 (log pi, log mu, A): mu and pi from 1e-12 to 1, close pairs, both signs of A and 0."""
    mu = [10.0**-k for k in range(13)] + [0.9, 0.5, 0.3]
    near = [(value, value * factor) for value in mu for factor in (0.999, 1.0 - 1e-9, 0.95, 0.77)]
    pairs = [*itertools.product(mu, mu), *near, *((pi, behaviour) for behaviour, pi in near)]
    advantages = [-3.0, -1.0, -1e-3, 0.0, 0.5, 2.0]
    rows = torch.tensor([(*pair, a) for pair in pairs for a in advantages], dtype=torch.float64)
    return rows[:, 0].log(), rows[:, 1].log(), rows[:, 2]


@pytest.fixture
def assert_weight_is_gradient() -> Callable[[Loss, Tensor, Tensor, Tensor, float], None]:
    """w against autograd of the value: -dL/dlogpi / (A r) = w, relative to max(1, |w|)."""

    def check(loss: Loss, logpi: Tensor, logmu: Tensor, advantages: Tensor, tolerance: float) -> None:
        logpi = logpi.clone().requires_grad_()
        value = loss.value(logpi, logmu, advantages)
        assert torch.isfinite(value).all()
        (gradient,) = torch.autograd.grad(value.sum(), logpi)
        weight = loss.weight(logpi, logmu, advantages)
        assert not weight.requires_grad
        assert torch.isfinite(weight).all()
        scale = advantages.abs() * compute_ratio(logpi, logmu).detach()
        used = scale > 0
        error = (gradient + advantages.sign() * scale * weight)[used] / scale[used]
        assert (error.abs() <= tolerance * weight[used].abs().clamp(min=1)).all()
        assert (gradient[~used] == 0).all()
        torch.testing.assert_close(
            loss.logprob_gradient(logpi, logmu, advantages), -advantages.sign() * scale * weight
        )

    return check
