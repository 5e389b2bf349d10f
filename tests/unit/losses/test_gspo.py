"""GSPO in its token form against the form of the paper with one ratio per sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_drpo.config.schema import LossConfig
from megatron_drpo.losses.gspo import GspoLoss
from megatron_drpo.losses.tokens import LossTokens, Sequences


def _paper(logprobs: Tensor, tokens: LossTokens, low: float, high: float) -> Tensor:
    """Mean over sequences of max(-A s, -A clip(s)), s differentiable through every token."""
    assert tokens.sequences is not None
    losses = []
    for i in range(tokens.sequences.num_sequences):
        mine = tokens.sequences.index_N == i
        ratio = (logprobs[mine] - tokens.anchor_logprobs_N[mine]).mean().exp()
        advantage = tokens.advantages_N[mine][0]
        losses.append(torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high)))
    return torch.stack(losses).mean()


def test_gradient_is_that_of_the_sequence_form(random_tokens: LossTokens) -> None:
    """Equal advantages within a sequence, weights 1 / (sequences * tokens): sequence_mean_token_mean."""
    assert random_tokens.sequences is not None
    index = random_tokens.sequences.index_N
    tokens = replace(random_tokens, advantages_N=torch.linspace(-2, 2.5, 10, dtype=torch.float64)[index])
    loss = GspoLoss.from_config(LossConfig(clip_low=0.03, clip_high=0.04))
    weights = 1 / (10.0 * torch.bincount(index).double())[index]

    logprobs = tokens.logprobs_N.clone().requires_grad_()
    value = _paper(logprobs, tokens, 0.03, 0.04)
    (expected,) = torch.autograd.grad(value, logprobs)
    assert 0 < int((expected == 0).sum()) < 200  # some sequences are clipped, some are not
    torch.testing.assert_close(weights * loss.logprob_gradient(tokens), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close((weights * loss.value(tokens)).sum(), value, rtol=1e-12, atol=0)


def test_by_hand(make_tokens: Callable[..., LossTokens]) -> None:
    """Sequence 0: ratios 4 and 1, s = 2; sequence 1: ratio 1 / 2 alone. Advantages per token."""
    sequences = Sequences(index_N=torch.tensor([0, 0, 1]), num_sequences=2)
    tokens = make_tokens([0.4, 0.2, 0.1], [0.1, 0.2, 0.2], [1.0, -1.0, -3.0], sequences=sequences)
    wide = GspoLoss(clip_low=0.9, clip_high=1.5)
    assert wide.value(tokens).tolist() == pytest.approx([-2.0, 2.0, 1.5])
    assert wide.logprob_gradient(tokens).tolist() == pytest.approx([-2.0, 2.0, 1.5])
    assert wide.weight(tokens).tolist() == pytest.approx([0.5, 2.0, 1.0])  # s / r
    assert wide.outside_trust_region(tokens).tolist() == [False, False, False]
    narrow = GspoLoss(clip_low=0.25, clip_high=0.5)
    assert narrow.value(tokens).tolist() == pytest.approx([-1.5, 2.0, 2.25])
    assert narrow.logprob_gradient(tokens).tolist() == pytest.approx([0.0, 2.0, 0.0])
    assert narrow.outside_trust_region(tokens).tolist() == [True, True, True]


def test_ranks_that_share_a_sequence_agree_with_one_that_holds_it(random_tokens: LossTokens) -> None:
    """Each of two ranks has half of every sequence's tokens; `reduce` adds up what both have."""
    loss = GspoLoss(clip_low=0.03, clip_high=0.04)
    whole = loss.logprob_gradient(random_tokens)
    assert random_tokens.sequences is not None
    index = random_tokens.sequences.index_N
    sums: dict[int, Tensor] = {}
    log_ratio = random_tokens.logprobs_N - random_tokens.anchor_logprobs_N
    halves = {0: slice(0, 100), 1: slice(100, 200)}
    for rank, half in halves.items():
        ones = torch.ones(100, dtype=torch.float64)
        sums[rank] = torch.stack(
            [
                torch.zeros(10, dtype=torch.float64).index_add_(0, index[half], v)
                for v in (log_ratio[half], ones)
            ]
        )
    for rank, half in halves.items():
        other = sums[1 - rank]
        shared = Sequences(
            index_N=index[half], num_sequences=10, reduce=lambda mine, other=other: mine + other
        )
        part = LossTokens(
            logprobs_N=random_tokens.logprobs_N[half],
            anchor_logprobs_N=random_tokens.anchor_logprobs_N[half],
            rollout_logprobs_N=random_tokens.rollout_logprobs_N[half],
            advantages_N=random_tokens.advantages_N[half],
            sequences=shared,
        )
        torch.testing.assert_close(loss.logprob_gradient(part), whole[half], rtol=1e-13, atol=0)


def test_the_ratio_of_a_sequence_is_held_at_the_clamp(make_tokens: Callable[..., LossTokens]) -> None:
    sequences = Sequences(index_N=torch.tensor([0]), num_sequences=1)
    tokens = make_tokens([1.0], [1e-20], [-1.0], sequences=sequences)
    loss = GspoLoss(clip_low=0.03, clip_high=0.04)
    assert loss.value(tokens).item() == pytest.approx(math.exp(30), rel=1e-12)
    assert loss.logprob_gradient(tokens).item() == 0.0


def test_bounds_of_another_scale_are_named() -> None:
    assert GspoLoss(clip_low=3e-4, clip_high=4e-4).warnings() == []
    low, high = GspoLoss.from_config(LossConfig()).warnings()
    assert "algorithm.loss.clip_low=0.2" in low
    assert "algorithm.loss.clip_high=0.2" in high
    assert "0.0003" in low
