"""A grid of probabilities and advantages, and the check that a loss's closed form is its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_drpo.losses.base import Loss, RatioLoss
from megatron_drpo.losses.cispo import CispoLoss
from megatron_drpo.losses.gspo import GspoLoss
from megatron_drpo.losses.tokens import LossTokens, Sequences, TopK

MakeTokens = Callable[..., LossTokens]
AssertGradient = Callable[[Loss, LossTokens, float], None]


def _topk(num_tokens: int, seed: int) -> TopK:
    """The 3 most probable of 6 ids under mu, and pi at the same ids."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, num_tokens, 6, generator=generator, dtype=torch.float64)
    logmu, logpi = logits.log_softmax(dim=-1)
    rollout_logprobs, ids = logmu.topk(3, dim=1)
    return TopK(logprobs_NK=logpi.gather(1, ids), rollout_logprobs_NK=rollout_logprobs)


@pytest.fixture
def make_tokens() -> MakeTokens:
    """`make_tokens(pi, mu, advantages, **fields)`: float64, from probabilities; other fields as given."""

    def make(pi: list[float], mu: list[float], advantages: list[float], **others: Any) -> LossTokens:
        logpi, logmu, a = (torch.tensor(x, dtype=torch.float64) for x in (pi, mu, advantages))
        required: dict[str, Any] = {"logprobs_N": logpi.log(), "anchor_logprobs_N": logmu.log()}
        required |= {"rollout_logprobs_N": logmu.log(), "advantages_N": a}
        return LossTokens(**(required | others))

    return make


@pytest.fixture
def loss_grid() -> LossTokens:
    """mu and pi from 1e-12 to 1, close pairs, both signs of A and 0; sequences of 7 tokens; a top-k."""
    mu = [10.0**-k for k in range(13)] + [0.9, 0.5, 0.3]
    near = [(value, value * factor) for value in mu for factor in (0.999, 1.0 - 1e-9, 0.95, 0.77)]
    pairs = [*itertools.product(mu, mu), *near, *((pi, behaviour) for behaviour, pi in near)]
    advantages = [-3.0, -1.0, -1e-3, 0.0, 0.5, 2.0]
    rows = torch.tensor([(*pair, a) for pair in pairs for a in advantages], dtype=torch.float64)
    index = torch.arange(len(rows)) // 7
    return LossTokens(
        logprobs_N=rows[:, 0].log(),
        anchor_logprobs_N=rows[:, 1].log(),
        rollout_logprobs_N=rows[:, 1].log(),
        advantages_N=rows[:, 2],
        sequences=Sequences(index_N=index, num_sequences=int(index[-1]) + 1),
        topk=_topk(len(rows), seed=0),
    )


@pytest.fixture
def random_tokens() -> LossTokens:
    """200 tokens as a step gives them: 10 sequences, an engine gap, drift, a reference policy."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, 200, generator=generator, dtype=torch.float64)
    index = torch.arange(200) % 10
    anchor = -6 * uniform - 0.01
    return LossTokens(
        logprobs_N=(anchor + 0.4 * noise[0] + 0.02 * (index - 5)).clamp(max=-1e-3),
        anchor_logprobs_N=anchor,
        rollout_logprobs_N=anchor + 0.3 * noise[1] + 0.04 * (index - 5),
        advantages_N=noise[2],
        ref_logprobs_N=anchor + 0.5 * noise[3],
        sequences=Sequences(index_N=index, num_sequences=10),
        topk=_topk(200, seed=1),
    )


@pytest.fixture
def cast() -> Callable[[LossTokens, torch.dtype], LossTokens]:
    """The same tokens in another dtype."""

    def convert(tokens: LossTokens, dtype: torch.dtype) -> LossTokens:
        names = [f.name for f in fields(tokens) if isinstance(getattr(tokens, f.name), Tensor)]
        tokens = replace(tokens, **{name: getattr(tokens, name).to(dtype) for name in names})
        if tokens.topk is None:
            return tokens
        logpi, logmu = tokens.topk.logprobs_NK.to(dtype), tokens.topk.rollout_logprobs_NK.to(dtype)
        return replace(tokens, topk=TopK(logprobs_NK=logpi, rollout_logprobs_NK=logmu))

    return convert


@pytest.fixture
def assert_gradient() -> AssertGradient:
    """The closed form against autograd of the value, relative to the gradient's natural scale.

    That is |A| r max(1, |w|): the larger of the plain policy gradient and the gradient itself; for GSPO and
    CISPO, whose coefficient is not r, the gradient itself.
    """

    def check(loss: Loss, tokens: LossTokens, tolerance: float) -> None:
        logprobs = tokens.logprobs_N.clone().requires_grad_()
        value = loss.value(tokens.with_logprobs(logprobs))
        assert torch.isfinite(value).all()
        (gradient,) = torch.autograd.grad(value.sum(), logprobs)
        assert torch.isfinite(gradient).all()
        # With a logprob that requires a gradient, as in training: nothing may leak into the closed form.
        closed = loss.logprob_gradient(tokens.with_logprobs(logprobs))
        weight = loss.weight(tokens.with_logprobs(logprobs))
        assert not closed.requires_grad
        assert not weight.requires_grad
        assert closed.dtype == weight.dtype == value.dtype == tokens.logprobs_N.dtype
        plain = tokens.advantages_N.abs() * tokens.ratio_N
        scale = closed.abs() if isinstance(loss, GspoLoss | CispoLoss) else torch.maximum(plain, closed.abs())
        assert ((gradient - closed).abs() <= tolerance * scale).all()
        if isinstance(loss, RatioLoss):
            assert torch.isfinite(weight).all()
        signed = -tokens.advantages_N * tokens.ratio_N
        expected = torch.where(signed == 0, torch.zeros_like(closed), signed * weight)
        torch.testing.assert_close(torch.where(signed == 0, torch.zeros_like(closed), closed), expected)

    return check
