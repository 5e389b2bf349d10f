from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from megatron_drpo.config.schema import Advantage
from megatron_drpo.step.advantages import compute_advantages

CENTRED = [Advantage.group_mean, Advantage.group_mean_std, Advantage.leave_one_out]


def tensor(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (Advantage.uncentred, [[1.0, 0.0, 0.0, 3.0], [2.0, 4.0, 4.0, 6.0]]),
        (Advantage.group_mean, [[0.0, -1.0, -1.0, 2.0], [-2.0, 0.0, 0.0, 2.0]]),
        # Sums of squares 6 and 8, divided by G - 1 = 3.
        (
            Advantage.group_mean_std,
            [
                [x / (math.sqrt(2) + 1e-6) for x in (0.0, -1.0, -1.0, 2.0)],
                [x / (math.sqrt(8 / 3) + 1e-6) for x in (-2.0, 0.0, 0.0, 2.0)],
            ],
        ),
        # 1 - (0 + 0 + 3) / 3, 0 - (1 + 0 + 3) / 3, ...
        (Advantage.leave_one_out, [[0.0, -4 / 3, -4 / 3, 8 / 3], [-8 / 3, 0.0, 0.0, 8 / 3]]),
    ],
)
def test_values_by_hand(estimator: Advantage, expected: list[list[float]]) -> None:
    rewards = tensor([[1.0, 0.0, 0.0, 3.0], [2.0, 4.0, 4.0, 6.0]])
    torch.testing.assert_close(
        compute_advantages(rewards, estimator), tensor(expected), rtol=1e-12, atol=1e-12
    )


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others() -> None:
    rewards = torch.rand(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for p in range(7):
        for g in range(5):
            others = [rewards[p, i].item() for i in range(5) if i != g]
            advantage = compute_advantages(rewards, Advantage.leave_one_out)[p, g].item()
            assert advantage == pytest.approx(rewards[p, g].item() - sum(others) / 4, abs=1e-12)


groups = st.integers(2, 6).flatmap(
    lambda size: st.lists(
        st.lists(st.floats(-100, 100), min_size=size, max_size=size), min_size=1, max_size=4
    )
)


@given(groups)
@example([[-100.0, -99.99999999999999]])
def test_centred_advantages_sum_to_zero_and_are_finite(rows: list[list[float]]) -> None:
    for estimator in CENTRED:
        advantages = compute_advantages(tensor(rows), estimator)
        assert advantages.isfinite().all()
        assert advantages.sum(dim=1).abs().max() < 1e-9


@given(groups, st.integers(-8, 8))
def test_centred_advantages_ignore_a_shift(rows: list[list[float]], shift: int) -> None:
    rewards = (tensor(rows) * 64).round() / 64  # so that adding the shift is exact
    for estimator in CENTRED:
        shifted = compute_advantages(rewards + shift, estimator)
        torch.testing.assert_close(shifted, compute_advantages(rewards, estimator), rtol=1e-9, atol=1e-9)


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 9))
def test_equal_rewards_give_exactly_zero(reward: float, num_samples: int) -> None:
    """0.1 + 0.1 + 0.1 is not 3 * 0.1: what rounding leaves must not be divided by a std of 0."""
    for dtype in (torch.float32, torch.float64):
        rewards = torch.full((2, num_samples), reward, dtype=dtype)
        for estimator in CENTRED:
            assert (compute_advantages(rewards, estimator) == 0).all()


def test_a_group_of_one_has_no_baseline() -> None:
    rewards = tensor([[5.0], [-2.0]])
    for estimator in CENTRED:
        assert compute_advantages(rewards, estimator).tolist() == [[0.0], [0.0]]
    assert compute_advantages(rewards, Advantage.uncentred).tolist() == [[5.0], [-2.0]]


def normalised(rewards: list[list[float]], counts: list[list[int]]) -> list[list[float]]:
    """REINFORCE++ with every token written out."""
    centred = [[r - sum(group) / len(group) for r in group] for group in rewards]
    tokens = [
        value
        for values, numbers in zip(centred, counts, strict=True)
        for value, number in zip(values, numbers, strict=True)
        for _ in range(number)
    ]
    mean = sum(tokens) / len(tokens)
    std = math.sqrt(sum((value - mean) ** 2 for value in tokens) / len(tokens))
    return [[(value - mean) / std for value in values] for values in centred]


REWARDS = [[1.0, 0.0, 0.0, 3.0], [2.0, 4.0, 4.0, 6.0], [5.0, 5.0, 5.0, 5.0]]
COUNTS = [[1, 5, 2, 3], [4, 0, 7, 1], [2, 2, 6, 1]]


def test_reinforce_plus_plus_is_normalised_over_tokens() -> None:
    actual = compute_advantages(
        tensor(REWARDS), Advantage.reinforce_plus_plus, num_tokens_PG=torch.tensor(COUNTS)
    )
    expected = tensor(normalised(REWARDS, COUNTS))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = tensor([[float(count) for count in row] for row in COUNTS])
    assert abs((weights * actual).sum().item()) < 1e-9
    assert (weights * actual.square()).sum().item() == pytest.approx(weights.sum().item())


def test_reinforce_plus_plus_without_counts_is_over_samples() -> None:
    ones = [[1] * 4] * 3
    actual = compute_advantages(tensor(REWARDS), Advantage.reinforce_plus_plus)
    torch.testing.assert_close(actual, tensor(normalised(REWARDS, ones)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("split", [0, 1, 2])
def test_reinforce_plus_plus_over_replicas_is_that_over_one(split: int) -> None:
    """Two replicas, one of them possibly empty: the same advantages as from all groups together."""
    parts: list[Tensor] = []

    def keep(moments: Tensor) -> Tensor:
        parts.append(moments)
        return moments

    shares = [(tensor(REWARDS)[part], torch.tensor(COUNTS)[part]) for part in (slice(split), slice(split, 3))]
    for rewards, counts in shares:
        compute_advantages(
            rewards, Advantage.reinforce_plus_plus, num_tokens_PG=counts, sum_over_replicas=keep
        )
    total = parts[0] + parts[1]
    actual = [
        compute_advantages(
            rewards,
            Advantage.reinforce_plus_plus,
            num_tokens_PG=counts,
            sum_over_replicas=lambda moments: total,
        )
        for rewards, counts in shares
    ]
    expected = tensor(normalised(REWARDS, COUNTS))
    torch.testing.assert_close(torch.cat(actual), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [[[3, 1], [1, 2]], [[0, 0], [0, 0]]])
def test_reinforce_plus_plus_of_equal_rewards_or_without_tokens(counts: list[list[int]]) -> None:
    """Nothing is learned, and nothing divides by 0."""
    equal = tensor([[0.1, 0.1], [7.0, 7.0]])
    actual = compute_advantages(equal, Advantage.reinforce_plus_plus, num_tokens_PG=torch.tensor(counts))
    assert actual.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("estimator", list(Advantage))
def test_result_has_the_dtype_of_the_rewards_and_its_own_memory(estimator: Advantage) -> None:
    rewards = torch.tensor([[1.0, 0.0]])
    advantages = compute_advantages(rewards, estimator)
    advantages += 1
    assert advantages.dtype is torch.float32
    assert rewards.tolist() == [[1.0, 0.0]]
