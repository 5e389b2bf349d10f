"""DPPO: which tokens are masked, and the four divergences against sums over whole distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.dppo import (
    REST_MIN,
    DppoBinaryKlLoss,
    DppoBinaryTvLoss,
    DppoLoss,
    DppoTopkKlLoss,
    DppoTopkTvLoss,
)
from megatron_drpo.losses.registry import build_loss
from megatron_drpo.losses.tokens import LossTokens, TopK

MakeTokens = Callable[..., LossTokens]


@pytest.mark.parametrize(
    ("pi", "advantage", "mask"),
    [
        (0.44, 1.0, 1.0),  # rises by 0.04 < mask_high
        (0.46, 1.0, 0.0),  # rises by 0.06 > mask_high
        (0.46, -1.0, 1.0),  # the same, but the advantage pulls it back
        (0.38, -1.0, 1.0),  # falls by 0.02 < mask_low
        (0.36, -1.0, 0.0),  # falls by 0.04 > mask_low
        (0.36, 1.0, 1.0),
        (0.46, 0.0, 1.0),
        (0.40, 1.0, 1.0),
    ],
)
def test_tv_masks_what_diverges_in_the_advantages_direction(
    pi: float, advantage: float, mask: float, make_tokens: MakeTokens
) -> None:
    loss = DppoBinaryTvLoss.from_config(LossConfig(mask_high=0.05, mask_low=0.03))
    tokens = make_tokens([pi], [0.4], [advantage])
    assert loss.weight(tokens).item() == mask
    value = -advantage * (pi / 0.4) * mask * math.log(pi)
    assert loss.value(tokens).item() == pytest.approx(value, abs=1e-15)
    assert loss.outside_trust_region(tokens).item() == (pi in (0.46, 0.36))


def test_tv_mask_over_the_grid(loss_grid: LossTokens) -> None:
    loss = DppoBinaryTvLoss(mask_high=0.13, mask_low=0.07)
    pi, mu, a = loss_grid.logprobs_N.exp(), loss_grid.anchor_logprobs_N.exp(), loss_grid.advantages_N
    masked = ((a > 0) & (pi - mu > 0.13)) | ((a < 0) & (pi - mu < -0.07))
    assert 0 < int(masked.sum()) < len(masked)
    assert torch.equal(loss.weight(loss_grid), (~masked).double())


def test_kl_mask_over_the_grid(loss_grid: LossTokens) -> None:
    loss = DppoBinaryKlLoss(mask_high=0.05, mask_low=0.02)
    expected = []
    for logpi, logmu, a in zip(
        loss_grid.logprobs_N.tolist(),
        loss_grid.anchor_logprobs_N.tolist(),
        loss_grid.advantages_N.tolist(),
        strict=True,
    ):
        kl = _bernoulli_kl(logmu, logpi)
        rises, falls = a > 0 and logpi > logmu, a < 0 and logpi < logmu
        expected.append(not ((rises and kl > 0.05) or (falls and kl > 0.02)))
    assert torch.equal(loss.weight(loss_grid), torch.tensor(expected, dtype=torch.float64))


def _bernoulli_kl(logmu: float, logpi: float, least: float = 2.0**-23) -> float:
    """KL(mu || pi) of two outcomes, with 60 digits; the other outcome has at least so much probability."""
    with localcontext() as context:
        context.prec = 60
        mu, pi = Decimal(logmu).exp(), Decimal(logpi).exp()
        others_mu, others_pi = max(1 - mu, Decimal(least)), max(1 - pi, Decimal(least))
        return float(mu * (mu / pi).ln() + others_mu * (others_mu / others_pi).ln())


def test_binary_kl_is_exact_from_1e_12_to_1(loss_grid: LossTokens) -> None:
    kl = DppoBinaryKlLoss(mask_high=0.05, mask_low=0.05).divergence(loss_grid).tolist()
    pairs = zip(loss_grid.anchor_logprobs_N.tolist(), loss_grid.logprobs_N.tolist(), strict=True)
    for (logmu, logpi), value in zip(pairs, kl, strict=True):
        # Close to mu the KL is a small difference of terms of size mu: nothing a threshold could see.
        assert value == pytest.approx(_bernoulli_kl(logmu, logpi), rel=1e-12, abs=3e-16)


def test_binary_kl_by_hand(make_tokens: MakeTokens) -> None:
    tokens = make_tokens([0.25, 0.5, 1.0, 0.3, 1.0], [0.5, 0.5, 1.0, 1.0, 0.5], [1.0] * 5)
    # A certain token leaves the others float32's resolution, 2^-23.
    from_1 = -math.log(0.3) + 2**-23 * math.log(2**-23 / 0.7)
    to_1 = math.log(0.5) / 2 + math.log(0.5 / 2**-23) / 2
    expected = [math.log(2) / 2 + math.log(2 / 3) / 2, 0.0, 0.0, from_1, to_1]
    kl = DppoBinaryKlLoss(mask_high=0.05, mask_low=0.05).divergence(tokens)
    assert kl.tolist() == pytest.approx(expected, abs=1e-15)
    above_1 = replace(tokens, anchor_logprobs_N=torch.full((5,), 1e-7, dtype=torch.float64))
    assert DppoBinaryKlLoss(mask_high=0.05, mask_low=0.05).divergence(above_1)[2].item() == 0.0


NEARLY_CERTAIN = [(0.0, -1e-7), (0.0, -1e-6), (-1e-7, 0.0), (0.0, 0.0)]
"""(logpi, logmu) that differ by float32's rounding at most."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dppo_binary_kl", "dppo_topk_kl"])
def test_rounding_to_certainty_masks_nothing(name: str, dtype: torch.dtype) -> None:
    """A logprob of exactly 0 is a probability that float32 can not tell from 1, not one that is 1. Metrics
    read the same float32 values in float64, and must see the same divergence."""
    rows = torch.tensor([(*pair, a) for pair in NEARLY_CERTAIN for a in (-1.0, 1.0)]).to(dtype)
    logpi, logmu, advantages = rows.unbind(1)
    logpi = logpi.clone().requires_grad_()
    tokens = LossTokens(
        logprobs_N=logpi,
        anchor_logprobs_N=logmu,
        rollout_logprobs_N=logmu,
        advantages_N=advantages,
        topk=TopK(logprobs_NK=logpi.detach()[:, None], rollout_logprobs_NK=logmu[:, None]),
    )
    loss = build_loss(LossConfig(name=name, num_topk=1))
    assert isinstance(loss, DppoLoss)
    divergence = loss.divergence(tokens)
    assert divergence.min().item() >= (-1e-6 if name == "dppo_topk_kl" else -1e-7)
    assert divergence.max().item() <= 5e-6
    assert loss.weight(tokens).tolist() == [1.0] * len(rows)
    assert not loss.outside_trust_region(tokens).any()
    (gradient,) = torch.autograd.grad(loss.value(tokens).sum(), logpi)
    torch.testing.assert_close(gradient, -advantages, rtol=2e-6, atol=0)


def test_binary_kl_in_float32_near_certainty() -> None:
    """Against 60 digits: with the floor everywhere, without it wherever float32 resolves 1 - p."""
    exponents = torch.arange(1, 45) / 5
    near_1 = torch.cat([-(10.0**-exponents), torch.zeros(1)])
    pairs = torch.cartesian_prod(near_1, near_1)
    tokens = LossTokens(
        logprobs_N=pairs[:, 0],
        anchor_logprobs_N=pairs[:, 1],
        rollout_logprobs_N=pairs[:, 1],
        advantages_N=torch.ones(len(pairs)),
    )
    kl = DppoBinaryKlLoss(mask_high=0.15, mask_low=0.15).divergence(tokens)
    assert kl.dtype == torch.float32
    floored = [_bernoulli_kl(logmu, logpi) for logpi, logmu in pairs.tolist()]
    torch.testing.assert_close(kl.double(), torch.tensor(floored).double(), rtol=1e-5, atol=3e-7)
    resolved = (pairs < -(2.0**-23)).all(1)
    assert int(resolved.sum()) > 1000
    exact = [_bernoulli_kl(logmu, logpi, least=0.0) for logpi, logmu in pairs[resolved].tolist()]
    torch.testing.assert_close(kl[resolved].double(), torch.tensor(exact).double(), rtol=1e-5, atol=3e-7)


def test_cap_bounds_the_coefficient(make_tokens: MakeTokens) -> None:
    loss = DppoBinaryTvLoss.from_config(LossConfig(mask_high=0.15, ratio_cap=3.0))
    tokens = make_tokens([4e-3, 8e-3, 1e-3], [1e-3, 4e-3, 4e-3], [1.0, -2.0, 1.0])
    assert loss.weight(tokens).tolist() == pytest.approx([0.75, 1.0, 1.0])
    assert loss.logprob_gradient(tokens).tolist() == pytest.approx([-3.0, 4.0, -0.25])
    expected = [-3.0 * math.log(4e-3), 4.0 * math.log(8e-3), -0.25 * math.log(1e-3)]
    assert loss.value(tokens).tolist() == pytest.approx(expected)


def _distributions(num_tokens: int, vocab_size: int, num_topk: int) -> tuple[Tensor, Tensor, LossTokens]:
    """(mu, pi) over the whole vocabulary, and the tokens as a run would see them, one id sampled each."""
    generator = torch.Generator().manual_seed(vocab_size)
    base = 2 * torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64)
    drift = 0.5 * torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64)
    logmu, logpi = base.log_softmax(1), (base + drift).log_softmax(1)
    ids = torch.multinomial(logmu.exp(), 1, generator=generator)
    rollout_logprobs, topk_ids = logmu.topk(num_topk, dim=1)
    tokens = LossTokens(
        logprobs_N=logpi.gather(1, ids)[:, 0],
        anchor_logprobs_N=logmu.gather(1, ids)[:, 0],
        rollout_logprobs_N=logmu.gather(1, ids)[:, 0],
        advantages_N=torch.randn(num_tokens, generator=generator, dtype=torch.float64),
        topk=TopK(logprobs_NK=logpi.gather(1, topk_ids), rollout_logprobs_NK=rollout_logprobs),
    )
    return logmu.exp(), logpi.exp(), tokens


def _tv(mu: Tensor, pi: Tensor) -> Tensor:
    return (pi - mu).abs().sum(1) / 2


def _kl(mu: Tensor, pi: Tensor) -> Tensor:
    return (mu * (mu / pi).log()).sum(1)


@pytest.mark.parametrize(("vocab_size", "num_topk"), [(6, 5), (6, 2), (50, 1), (50, 20), (50, 49)])
def test_topk_against_the_whole_distribution(vocab_size: int, num_topk: int) -> None:
    """With K = V - 1 every id has its bin; with fewer, merging ids can only lower a divergence."""
    mu, pi, tokens = _distributions(64, vocab_size, num_topk)
    tv = DppoTopkTvLoss(mask_high=0.1, mask_low=0.1, num_ids=num_topk).divergence(tokens)
    kl = DppoTopkKlLoss(mask_high=0.1, mask_low=0.1, num_ids=num_topk).divergence(tokens)
    order = mu.argsort(dim=1, descending=True)
    mu, pi = mu.gather(1, order), pi.gather(1, order)
    bins = [torch.cat([p[:, :num_topk], p[:, num_topk:].sum(1, keepdim=True)], dim=1) for p in (mu, pi)]
    torch.testing.assert_close(tv, _tv(*bins), rtol=1e-11, atol=1e-14)
    resolved = torch.stack([b[:, -1] for b in bins]).min(dim=0).values > REST_MIN
    torch.testing.assert_close(kl[resolved], _kl(*bins)[resolved], rtol=1e-10, atol=1e-13)
    assert int(resolved.sum()) >= 32
    if num_topk == vocab_size - 1:
        torch.testing.assert_close(tv, _tv(mu, pi), rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(kl[resolved], _kl(mu, pi)[resolved], rtol=1e-10, atol=1e-13)
    else:
        assert (tv <= _tv(mu, pi) + 1e-14).all()
        assert (kl <= _kl(mu, pi) + 1e-6).all()


@pytest.mark.parametrize("name", ["dppo_topk_tv", "dppo_topk_kl"])
def test_topk_masks_by_the_direction_of_the_sampled_token(name: str) -> None:
    mu, pi, tokens = _distributions(400, 30, 8)
    loss = build_loss(LossConfig(name=name, mask_high=0.12, mask_low=0.07, num_topk=8))
    assert isinstance(loss, DppoLoss)
    order = mu.argsort(dim=1, descending=True)
    mu, pi = mu.gather(1, order), pi.gather(1, order)
    bins = [torch.cat([p[:, :8], p[:, 8:].sum(1, keepdim=True)], dim=1) for p in (mu, pi)]
    divergence = (_tv if name == "dppo_topk_tv" else _kl)(*bins).tolist()
    rises = (tokens.logprobs_N > tokens.rollout_logprobs_N).tolist()
    positive = (tokens.advantages_N > 0).tolist()
    expected = [
        not ((a and up and d > 0.12) or (not a and not up and d > 0.07))
        for d, up, a in zip(divergence, rises, positive, strict=True)
    ]
    assert 50 < sum(expected) < 350
    assert loss.weight(tokens).tolist() == [float(kept) for kept in expected]
    outside = [d > (0.12 if up else 0.07) for d, up in zip(divergence, rises, strict=True)]
    assert loss.outside_trust_region(tokens).tolist() == outside


def test_equal_policies_diverge_by_rounding_only_where_the_topk_holds_all_mass() -> None:
    """float32, a peaked distribution: the rest is below rounding, and an empty bin must not mean infinity."""
    generator = torch.Generator().manual_seed(0)
    logits = 12 * torch.randn(500, 1000, generator=generator)
    rollout_logprobs, ids = logits.log_softmax(1).topk(20, dim=1)
    # Another order of summation, as in another engine.
    logpi = (logits.double() - logits.double().logsumexp(1, keepdim=True)).float().gather(1, ids)
    policy = LossTokens(
        logprobs_N=logpi[:, 0],
        anchor_logprobs_N=rollout_logprobs[:, 0],
        rollout_logprobs_N=rollout_logprobs[:, 0],
        advantages_N=torch.ones(500),
        topk=TopK(logprobs_NK=logpi, rollout_logprobs_NK=rollout_logprobs),
    )
    rest = 1 - rollout_logprobs.double().exp().sum(1)
    assert int((rest < 1e-7).sum()) > 20
    for loss_class in (DppoTopkTvLoss, DppoTopkKlLoss):
        divergence = loss_class(mask_high=0.1, mask_low=0.1, num_ids=20).divergence(policy)
        assert divergence.abs().max().item() < 1e-5


def test_an_id_without_mass_adds_nothing(make_tokens: MakeTokens) -> None:
    logmu = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    logpi = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    tokens = make_tokens([0.9], [1.0], [1.0], topk=TopK(logprobs_NK=logpi, rollout_logprobs_NK=logmu))
    kl = DppoTopkKlLoss(mask_high=0.1, mask_low=0.1, num_ids=2).divergence(tokens)
    assert kl.item() == pytest.approx(-math.log(0.9), abs=1e-9)


def test_a_topk_loss_without_topk_says_so(make_tokens: MakeTokens) -> None:
    loss = DppoTopkTvLoss.from_config(LossConfig(num_topk=4))
    assert (loss.num_topk, loss.mask_high, loss.mask_low, loss.ratio_cap) == (4, 0.15, 0.15, None)
    with pytest.raises(ValueError, match="top-k"):
        loss.weight(make_tokens([0.5], [0.5], [1.0]))


def test_settings_that_do_nothing_are_named() -> None:
    for name in ("dppo_binary_tv", "dppo_topk_tv"):
        assert build_loss(LossConfig(name=name, ratio_cap=1.0)).warnings() == []
        high, low, cap = build_loss(LossConfig(name=name, mask_high=1.0, ratio_cap=0.5)).warnings()
        assert "algorithm.loss.mask_high=1.0" in high
        assert "algorithm.loss.mask_low=1.0" in low
        assert "algorithm.loss.ratio_cap=0.5" in cap
    for name in ("dppo_binary_kl", "dppo_topk_kl"):  # a KL has no bound
        assert build_loss(LossConfig(name=name, mask_high=2.0, ratio_cap=10000.0)).warnings() == []
