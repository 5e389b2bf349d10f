from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_drpo.config.schema import Overlong, RewardConfig
from megatron_drpo.rewards.overlong import compute_overlong, soft_penalty
from megatron_drpo.types import FinishReason, Rollout


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0)],
)
def test_soft_penalty_with_the_numbers_of_the_paper(length: int, penalty: float) -> None:
    """DAPO: an expected maximum of 16,384 tokens and a buffer of 4,096 more."""
    assert soft_penalty(length, max_response_tokens=20480, buffer_tokens=4096) == penalty


@pytest.fixture
def rollouts(make_rollout: Callable[..., Rollout]) -> list[Rollout]:
    return [
        make_rollout("", num_tokens=50),
        make_rollout("", num_tokens=90),
        make_rollout("", num_tokens=100),  # its last token is the stop token
        make_rollout("", num_tokens=100, finish_reason=FinishReason.length),
        make_rollout("", num_tokens=10, finish_reason=FinishReason.abort),
    ]


@pytest.mark.parametrize(
    ("overlong", "penalties", "left_out"),
    [
        (Overlong.keep, [0.0] * 5, [False] * 5),
        (Overlong.mask, [0.0] * 5, [False, False, False, True, True]),
        (Overlong.soft_penalty, [0.0, -0.5, -1.0, -1.0, 0.0], [False] * 5),
    ],
)
def test_effect(
    rollouts: list[Rollout], overlong: Overlong, penalties: list[float], left_out: list[bool]
) -> None:
    config = RewardConfig(overlong=overlong, overlong_buffer_tokens=20)
    effect = compute_overlong(rollouts, config, max_response_tokens=100)
    assert effect.penalties == penalties
    assert effect.left_out == left_out
