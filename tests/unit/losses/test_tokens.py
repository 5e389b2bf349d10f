"""The ratio and its clamp; means over sequences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_drpo.losses.tokens import LOG_RATIO_MAX, LossTokens, Sequences


def test_ratio_is_exact_for_every_probability_down_to_1e_12(make_tokens: Callable[..., LossTokens]) -> None:
    mu, pi = [1e-12, 1e-6, 0.5, 1.0, 1e-12], [1.0, 0.25, 0.5, 1e-12, 2e-12]
    tokens = make_tokens(pi, mu, [1.0] * 5)
    expected = torch.tensor([p / m for p, m in zip(pi, mu, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(tokens.ratio_N, expected, rtol=1e-12, atol=0)
    assert tokens.is_unclamped_N.all()
    expected = torch.tensor([p - m for p, m in zip(pi, mu, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(tokens.difference_N, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(tokens.probs_N, torch.tensor(pi, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ratio_is_held_from_above_only(make_tokens: Callable[..., LossTokens]) -> None:
    tokens = make_tokens([1.0, 1.0, 1e-300], [1e-13, 1e-14, 1.0], [1.0] * 3)
    assert tokens.is_unclamped_N.tolist() == [True, False, True]
    expected = torch.tensor([1e13, 1.0686474581524463e13, 1e-300], dtype=torch.float64)  # e^30
    torch.testing.assert_close(tokens.ratio_N, expected, rtol=1e-12, atol=0)
    assert LOG_RATIO_MAX == 30.0


def test_mean_over_sequences_by_hand(make_tokens: Callable[..., LossTokens]) -> None:
    sequences = Sequences(index_N=torch.tensor([0, 2, 0, 2, 2]), num_sequences=4)
    tokens = make_tokens([0.5] * 5, [0.5] * 5, [1.0] * 5, sequences=sequences)
    values = torch.tensor([1.0, 2.0, 4.0, 0.0, 7.0], requires_grad=True)
    means = tokens.mean_over_sequence(values)
    assert means.tolist() == [2.5, 3.0, 2.5, 3.0, 3.0]
    assert not means.requires_grad


def test_mean_over_sequences_that_ranks_share() -> None:
    """Two ranks hold 2 and 1 tokens of the sequence: sums and counts are added up, never the means."""
    values, index = torch.tensor([1.0, 2.0, 6.0]), torch.zeros(3, dtype=torch.int64)
    other = torch.tensor([[6.0], [1.0]])
    sequences = Sequences(index_N=index[:2], num_sequences=1, reduce=lambda sums: sums + other)
    assert sequences.mean(values[:2]).tolist() == [3.0, 3.0]


def test_a_part_of_a_micro_batch_has_no_sequences(make_tokens: Callable[..., LossTokens]) -> None:
    tokens = make_tokens([0.5], [0.5], [1.0])
    with pytest.raises(ValueError, match="a part of a micro-batch"):
        tokens.mean_over_sequence(tokens.logprobs_N)


def test_with_logprobs_changes_nothing_else(random_tokens: LossTokens) -> None:
    assert random_tokens.ref_logprobs_N is not None
    other = random_tokens.with_logprobs(random_tokens.ref_logprobs_N)
    assert other.logprobs_N is random_tokens.ref_logprobs_N
    assert other.anchor_logprobs_N is random_tokens.anchor_logprobs_N
    assert other.sequences is random_tokens.sequences
