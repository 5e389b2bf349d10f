"""Counting responses and groups, and adding the counts up."""

from __future__ import annotations

from dataclasses import replace

from megatron_drpo.metrics.sample_statistics import SampleStatistics, add_up
from megatron_drpo.types import FinishReason, Prompt, Rollout

ROLLOUT = Rollout(
    prompt=Prompt(id=3, text="", token_ids=(1, 2)),
    sample_index=0,
    response_ids=[4, 5, 6],
    rollout_logprobs=[-1.0] * 3,
    policy_versions=[4, 4, 6],
    finish_reason=FinishReason.stop,
    text="",
)


def test_responses_by_hand() -> None:
    statistics = SampleStatistics()
    statistics.count_rollout(ROLLOUT, 0.5)
    cut = replace(ROLLOUT, response_ids=[4] * 7, finish_reason=FinishReason.length)
    statistics.count_rollout(cut, -2.0)
    statistics.count_staleness(ROLLOUT, 7)
    expected = SampleStatistics(
        num_samples=2,
        reward_sum=-1.5,
        reward_square_sum=4.25,
        reward_max=0.5,
        reward_negated_max=2.0,
        length_sum=10,
        num_truncated=1,
        num_prompt_tokens=4,
        length_max=7,
        num_response_tokens=3,
        staleness_sum=7,
        staleness_max=3,
    )
    assert statistics == expected


def test_groups_by_what_they_say() -> None:
    other = replace(ROLLOUT, response_ids=[4, 5, 7])
    statistics = SampleStatistics()
    statistics.count_group([ROLLOUT, other], [0.0, 1.0])
    statistics.count_group([ROLLOUT, other], [1.0, 1.0])
    statistics.count_group([ROLLOUT, ROLLOUT], [1.0, 1.0])
    statistics.count_group([ROLLOUT], [1.0])
    assert statistics == SampleStatistics(num_groups_scored=4, num_groups_varied=1, num_groups_identical=1)


def test_replicas_are_added_up() -> None:
    """One of them sampled nothing."""
    parts = [
        SampleStatistics(num_samples=2, reward_max=0.5, reward_negated_max=1.0, num_rounds=3, length_max=4),
        SampleStatistics(),
        SampleStatistics(num_samples=3, reward_max=-1.0, reward_negated_max=2.0, num_rounds=3, length_max=9),
    ]
    total = SampleStatistics(
        num_samples=5, reward_max=0.5, reward_negated_max=2.0, num_rounds=3, length_max=9
    )
    assert add_up(parts) == total
    assert add_up(iter(parts)) == total
