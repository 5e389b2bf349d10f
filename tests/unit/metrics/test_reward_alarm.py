"""When rewards say nothing, and what the likely reason is."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_drpo.config.schema import (
    Advantage,
    AlgorithmConfig,
    Config,
    DataConfig,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
)
from megatron_drpo.metrics.reward_alarm import RewardAlarm
from megatron_drpo.metrics.sample_statistics import SampleStatistics


def make_config(
    reward: str = "math_verify", advantage: Advantage = Advantage.group_mean, num_samples: int = 8
) -> Config:
    return Config(
        run_dir="runs/x",
        data=DataConfig(train_path="train.jsonl"),
        policy=PolicyConfig(model_path="unused"),
        reward=RewardConfig(name=reward),
        rollout=RolloutConfig(num_samples_per_prompt=num_samples, max_response_tokens=64),
        algorithm=AlgorithmConfig(advantage=advantage),
    )


def step(low: float = 0.0, high: float = 0.0, **fields: Any) -> SampleStatistics:
    """4 groups of 8 samples, half of which have the lower reward."""
    known: dict[str, Any] = {
        "num_samples": 32,
        "reward_sum": 16 * (low + high),
        "reward_max": high,
        "reward_negated_max": -low,
        "num_groups_scored": 4,
    }
    return SampleStatistics(**(known | fields))


NO_SIGNAL = [
    (
        make_config(),
        step(num_truncated=30),
        "all 320 rewards of 10 steps are 0: ",
        "94% of the responses are cut off, at rollout.max_response_tokens=64 or before their end",
    ),
    (
        make_config("my:reward"),
        step(num_reward_failures=32, num_truncated=32),
        "all 320 rewards of 10 steps are 0: ",
        "100% of the responses score 0 because reward my:reward fails on them or takes longer than",
    ),
    (
        make_config(),
        step(num_groups_identical=3),
        "all 320 rewards of 10 steps are 0: ",
        "in 75% of the groups all samples are the same; rollout.temperature=1, ",
    ),
    (
        make_config(),
        step(num_truncated=15),
        "all 320 rewards of 10 steps are 0: ",
        "no response matches its prompt's `answer`: reward math_verify cannot read the answers of train.",
    ),
    (
        make_config("my:reward", Advantage.uncentred),
        step(-0.5, -0.5),
        "all 320 rewards of 10 steps are -0.5: ",
        "reward my:reward finds no answer in the responses, or is the same for any",
    ),
    (
        make_config(),
        step(1.0, 1.0),
        "all 320 rewards of 10 steps are 1: ",
        "the prompts are too easy for this model, or reward math_verify is the same for any response",
    ),
    (
        make_config(),
        step(0.0, 1.0),
        "in none of the 40 groups of 10 steps do the rewards differ, so that every advantage is 0",
        "its samples all right or all wrong (mean reward 0.5)",
    ),
    (
        make_config(advantage=Advantage.leave_one_out),
        step(0.0, 1.0, num_truncated=16),
        "(algorithm.advantage=leave_one_out): ",
        "50% of the responses are cut off",
    ),
    (
        make_config(num_samples=1),
        step(0.0, 1.0),
        "in none of the 40 groups",
        "rollout.num_samples_per_prompt=1, and there is nothing to compare a single response with",
    ),
]


@pytest.mark.parametrize(("config", "statistics", "what", "reason"), NO_SIGNAL)
def test_no_signal_and_why(config: Config, statistics: SampleStatistics, what: str, reason: str) -> None:
    alarm = RewardAlarm(config)
    for _ in range(2):  # windows that do not overlap
        assert [alarm.update(statistics) for _ in range(9)] == [None] * 9
        message = alarm.update(statistics)
        assert message is not None
        assert what in message
        assert reason in message
        assert "runs/x/rollouts" in message
        assert "\n" not in message, "an alarm is one line"


@pytest.mark.parametrize(
    ("advantage", "odd"),
    [
        (Advantage.group_mean, step(0.0, 1.0, num_groups_varied=1)),
        (Advantage.group_mean_std, step(0.0, 0.25, num_groups_varied=1)),
        # Their advantages compare with 0, or with all responses of the step.
        (Advantage.uncentred, step(0.0, 1.0)),
        (Advantage.reinforce_plus_plus, step(0.0, 1.0)),
    ],
)
def test_one_step_with_signal_is_enough(advantage: Advantage, odd: SampleStatistics) -> None:
    alarm = RewardAlarm(make_config(advantage=advantage))
    assert [alarm.update(s) for s in [*[step()] * 9, odd]] == [None] * 10


def test_steps_that_are_each_constant_are_not_all_equal() -> None:
    alarm = RewardAlarm(make_config(), window_steps=2)
    assert alarm.update(step(0.0, 0.0)) is None
    message = alarm.update(step(1.0, 1.0))
    assert message is not None
    assert message.startswith("in none of the 8 groups of 2 steps")


def test_a_window_without_responses_says_nothing() -> None:
    alarm = RewardAlarm(make_config(), window_steps=1)
    assert alarm.update(SampleStatistics()) is None
