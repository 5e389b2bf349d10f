"""The KL penalty: hand-computed values, gradients, and what the estimators estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megatron_drpo.config.schema import KlConfig, KlEstimator
from megatron_drpo.losses.kl import build_kl_penalty
from megatron_drpo.losses.tokens import LossTokens

ESTIMATORS = list(KlEstimator)


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        (KlEstimator.k1, math.log(2), 1.0),
        (KlEstimator.k2, math.log(2) ** 2 / 2, math.log(2)),
        (KlEstimator.k3, 0.5 - 1 + math.log(2), 0.5),
    ],
)
def test_by_hand(
    estimator: KlEstimator, value: float, gradient: float, make_tokens: Callable[..., LossTokens]
) -> None:
    """pi = 0.4, ref = 0.2: x = log 2; the coefficient multiplies all of it."""
    kl = build_kl_penalty(KlConfig(coef=0.1, estimator=estimator))
    assert kl is not None
    tokens = make_tokens([0.4], [0.9], [1.0], ref_logprobs_N=torch.tensor([0.2], dtype=torch.float64).log())
    assert kl.value(tokens).item() == pytest.approx(0.1 * value, rel=1e-12)
    assert kl.logprob_gradient(tokens).item() == pytest.approx(0.1 * gradient, rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_closed_form_is_the_gradient(
    estimator: KlEstimator,
    dtype: torch.dtype,
    tolerance: float,
    loss_grid: LossTokens,
    cast: Callable[[LossTokens, torch.dtype], LossTokens],
) -> None:
    """pi and ref from 1e-12 to 1, and one pair beyond the clamp."""
    kl = build_kl_penalty(KlConfig(coef=0.3, estimator=estimator))
    assert kl is not None
    tokens = cast(replace(loss_grid, ref_logprobs_N=loss_grid.anchor_logprobs_N), dtype)
    tokens.logprobs_N[0] = -80.0
    logprobs = tokens.logprobs_N.clone().requires_grad_()
    value = kl.value(tokens.with_logprobs(logprobs))
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    closed = kl.logprob_gradient(tokens)
    assert torch.isfinite(value).all()
    assert ((gradient - closed).abs() <= tolerance * closed.abs().clamp(min=1)).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimates_and_gradients_over_a_whole_distribution(estimator: KlEstimator) -> None:
    """Exact expectations under pi: k1 and k3 are unbiased; k2's gradient is that of KL(pi || ref), k3's that
    of KL(ref || pi), k1's is 0."""
    generator = torch.Generator().manual_seed(3)
    logits, ref_logits = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logpi, logref = logits.log_softmax(0), ref_logits.log_softmax(0)
    pi = logpi.exp().detach()
    forward = (logpi.exp() * (logpi - logref)).sum()
    reverse = (logref.exp() * (logref - logpi)).sum()
    kl = build_kl_penalty(KlConfig(coef=1.0, estimator=estimator))
    assert kl is not None
    zeros = torch.zeros(9, dtype=torch.float64)
    tokens = LossTokens(
        logprobs_N=logpi,
        anchor_logprobs_N=zeros,
        rollout_logprobs_N=zeros,
        advantages_N=zeros,
        ref_logprobs_N=logref,
    )
    estimate = (pi * kl.value(tokens)).sum()
    if estimator is not KlEstimator.k2:
        torch.testing.assert_close(estimate, forward, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    expected = {
        KlEstimator.k1: torch.zeros(9, dtype=torch.float64),
        KlEstimator.k2: torch.autograd.grad(forward, logits, retain_graph=True)[0],
        KlEstimator.k3: torch.autograd.grad(reverse, logits, retain_graph=True)[0],
    }
    torch.testing.assert_close(gradient, expected[estimator], rtol=1e-11, atol=1e-14)


def test_no_coefficient_no_penalty_and_k1_is_named() -> None:
    assert build_kl_penalty(KlConfig(coef=0.0)) is None
    k3, k1 = (build_kl_penalty(KlConfig(coef=0.1, estimator=e)) for e in (KlEstimator.k3, KlEstimator.k1))
    assert k3 is not None
    assert k1 is not None
    assert k3.warnings() == []
    (warning,) = k1.warnings()
    assert warning.startswith("algorithm.kl.estimator=k1: ")


def test_without_a_reference_policy_it_says_so(make_tokens: Callable[..., LossTokens]) -> None:
    kl = build_kl_penalty(KlConfig(coef=0.1))
    assert kl is not None
    with pytest.raises(ValueError, match="reference policy"):
        kl.value(make_tokens([0.5], [0.5], [1.0]))
