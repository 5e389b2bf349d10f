"""What holds for every loss of the registry: the closed form is the gradient, the clamp, no overflow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.base import Loss, RatioLoss
from megatron_drpo.losses.registry import LOSSES, build_loss
from megatron_drpo.losses.tokens import LOG_RATIO_MAX, LossTokens, Sequences, TopK

SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {"mask_high": 0.13},
    "asymmetric": {
        "delta": 0.05,
        "epsilon": 0.5,
        "mask_high": 0.17,
        "mask_low": 0.06,
        "ratio_cap": 3.0,
        "clip_low": 0.15,
        "clip_high": 0.3,
        "dual_clip": 3.0,
    },
    "beyond": {"delta": 12.5, "epsilon": 12.5, "mask_high": 2.0, "clip_low": 1.0, "clip_high": 9.0},
}
EVERY_LOSS = [
    pytest.param(build_loss(LossConfig(name=name, **settings)), id=f"{name}-{title}")
    for name in LOSSES
    for title, settings in SETTINGS.items()
]
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-6)]


@pytest.mark.parametrize("loss", EVERY_LOSS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_closed_form_is_the_gradient_of_the_value(
    loss: Loss,
    dtype: torch.dtype,
    tolerance: float,
    loss_grid: LossTokens,
    cast: Callable[[LossTokens, torch.dtype], LossTokens],
    assert_gradient: Callable[[Loss, LossTokens, float], None],
) -> None:
    assert_gradient(loss, cast(loss_grid, dtype), tolerance)


def _three_tokens(logpi: float, logmu: float, dtype: torch.dtype) -> LossTokens:
    """A = -1, 0, 2, each a sequence of its own."""
    uniform = torch.full((3, 2), 0.25, dtype=dtype).log()
    return LossTokens(
        logprobs_N=torch.full((3,), logpi, dtype=dtype),
        anchor_logprobs_N=torch.full((3,), logmu, dtype=dtype),
        rollout_logprobs_N=torch.full((3,), logmu, dtype=dtype),
        advantages_N=torch.tensor([-1.0, 0.0, 2.0], dtype=dtype),
        sequences=Sequences(index_N=torch.arange(3), num_sequences=3),
        topk=TopK(logprobs_NK=uniform, rollout_logprobs_NK=uniform),
    )


@pytest.mark.parametrize("loss", EVERY_LOSS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(
    "log_ratio", [LOG_RATIO_MAX - 1, LOG_RATIO_MAX, LOG_RATIO_MAX + 1, 300.0, -60.0, -300.0]
)
def test_closed_form_is_the_gradient_at_and_beyond_the_clamp(
    loss: Loss,
    dtype: torch.dtype,
    tolerance: float,
    log_ratio: float,
    assert_gradient: Callable[[Loss, LossTokens, float], None],
) -> None:
    logpi = min(0.0, log_ratio)
    tokens = _three_tokens(logpi, logpi - log_ratio, dtype)
    assert_gradient(loss, tokens, tolerance)
    if log_ratio > LOG_RATIO_MAX and loss.__class__.__name__ != "CispoLoss":
        assert (loss.logprob_gradient(tokens) == 0).all()
        assert (loss.weight(tokens) == 0).all()


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_on_policy_every_loss_is_the_plain_policy_gradient(loss: Loss, random_tokens: LossTokens) -> None:
    topk = random_tokens.topk
    assert topk is not None
    tokens = replace(
        random_tokens,
        logprobs_N=random_tokens.anchor_logprobs_N,
        rollout_logprobs_N=random_tokens.anchor_logprobs_N,
        topk=replace(topk, logprobs_NK=topk.rollout_logprobs_NK),
    )
    torch.testing.assert_close(loss.logprob_gradient(tokens), -tokens.advantages_N, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss.weight(tokens), torch.ones_like(tokens.advantages_N))
    assert not loss.outside_trust_region(tokens).any()


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_gradient_scales_with_the_advantage(loss: Loss, loss_grid: LossTokens) -> None:
    """Doubling A doubles the gradient, except for the ablations whose penalty does not know A."""
    gradient = loss.logprob_gradient(loss_grid)
    doubled = loss.logprob_gradient(replace(loss_grid, advantages_N=2 * loss_grid.advantages_N))
    if "Unweighted" in loss.__class__.__name__:
        plain = -loss_grid.advantages_N * loss_grid.ratio_N
        unclamped = loss_grid.log_ratio_N <= 20
        torch.testing.assert_close((doubled - gradient)[unclamped], plain[unclamped], rtol=1e-3, atol=1e-6)
    else:
        torch.testing.assert_close(doubled, 2 * gradient, rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_tokens_do_not_depend_on_their_company(loss: Loss, random_tokens: LossTokens) -> None:
    """Any part of a micro-batch gives the same, unless the loss asks for whole sequences and says so."""
    part = LossTokens(
        logprobs_N=random_tokens.logprobs_N[50:90],
        anchor_logprobs_N=random_tokens.anchor_logprobs_N[50:90],
        rollout_logprobs_N=random_tokens.rollout_logprobs_N[50:90],
        advantages_N=random_tokens.advantages_N[50:90],
        topk=None
        if random_tokens.topk is None
        else TopK(
            logprobs_NK=random_tokens.topk.logprobs_NK[50:90],
            rollout_logprobs_NK=random_tokens.topk.rollout_logprobs_NK[50:90],
        ),
    )
    if loss.needs_sequences:
        with pytest.raises(ValueError, match="whole sequences"):
            loss.logprob_gradient(part)
        return
    assert torch.equal(loss.value(part), loss.value(random_tokens)[50:90])
    assert torch.equal(loss.logprob_gradient(part), loss.logprob_gradient(random_tokens)[50:90])
    assert torch.equal(loss.outside_trust_region(part), loss.outside_trust_region(random_tokens)[50:90])


def test_what_the_losses_ask_for() -> None:
    built = {name: build_loss(LossConfig(name=name, num_topk=7)) for name in LOSSES}
    assert {name for name, loss in built.items() if loss.needs_sequences} == {"gspo"}
    assert {name for name, loss in built.items() if not loss.has_trust_region} == {"surrogate"}
    assert {name: loss.num_topk for name, loss in built.items() if loss.num_topk} == {
        "dppo_topk_tv": 7,
        "dppo_topk_kl": 7,
    }


logprob = st.floats(min_value=-2e4, max_value=0, width=32)


@given(logpi=logprob, logmu=logprob, advantage=st.floats(min_value=-100, max_value=100, width=32))
def test_nothing_overflows_in_float32(logpi: float, logmu: float, advantage: float) -> None:
    for name in LOSSES:
        loss = build_loss(LossConfig(name=name))
        tokens = _three_tokens(logpi, logmu, torch.float32)
        # SPO squares r: its clamp keeps the squared gradient finite for |A| / epsilon up to 75.
        largest = 10.0 if name == "spo" else 100.0
        tokens.advantages_N.fill_(max(-largest, min(largest, advantage)))
        policy = tokens.logprobs_N.clone().requires_grad_()
        value = loss.value(tokens.with_logprobs(policy))
        (gradient,) = torch.autograd.grad(value.sum(), policy)
        for tensor in (value, gradient, gradient.square(), loss.logprob_gradient(tokens)):
            assert torch.isfinite(tensor).all()
        weight = loss.weight(tokens)
        # Where the coefficient is not r, w = coefficient / r may exceed float32 for a vanishing r.
        assert torch.isfinite(weight).all() if isinstance(loss, RatioLoss) else not weight.isnan().any()
