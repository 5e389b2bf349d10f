"""From prompts to training sequences, with an engine and rewards whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megatron_drpo.config import (
    Advantage,
    AlgorithmConfig,
    Config,
    DataConfig,
    EvalConfig,
    MetricsConfig,
    Overlong,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
)
from megatron_drpo.data.source import PromptSource
from megatron_drpo.experience import (
    EVAL_SEED_STEP,
    DemonstrationExperience,
    Evaluator,
    PromptShare,
    RolloutExperience,
    SampleStatistics,
    build_sequences,
)
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.rewards.pool import RewardPool
from megatron_drpo.rollout.engine import RolloutEngine
from megatron_drpo.types import FinishReason, Prompt, Rollout, RolloutGroup

PROMPTS = [
    Prompt(id=number, text=f"p{number}", token_ids=(7,) * (number + 1), response="ab") for number in range(8)
]


class Engine:
    """Sample i of prompt p has p + i + 1 tokens; the last sample of a group is cut off by the limit."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def generate(self, prompts: list[Prompt], **settings: Any) -> list[RolloutGroup]:
        self.calls.append({"prompts": [prompt.id for prompt in prompts], **settings})
        num_samples = settings.get("num_samples_per_prompt", 2)
        return [
            RolloutGroup(prompt=p, rollouts=[sample(p, i, num_samples) for i in range(num_samples)])
            for p in prompts
        ]


def sample(prompt: Prompt, index: int, num_samples: int = 2) -> Rollout:
    length = prompt.id + index + 1
    return Rollout(
        prompt=prompt,
        sample_index=index,
        response_ids=list(range(10, 10 + length)),
        rollout_logprobs=[-0.5 * (position + 1) for position in range(length)],
        policy_versions=[4] * length,
        finish_reason=FinishReason.length if index == num_samples - 1 else FinishReason.stop,
        text="text",
    )


class Rewards:
    """10 p + i."""

    def score(self, rollouts: list[Rollout]) -> list[float]:
        return [10.0 * rollout.prompt.id + rollout.sample_index for rollout in rollouts]


def make_share(num_prompts: int, rank: int = 0, size: int = 1) -> PromptShare:
    return PromptShare(PromptSource(PROMPTS, shuffle=False, seed=0), num_prompts, rank, size)


def make_config(**sections: Any) -> Config:
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path="unused"),
        rollout=RolloutConfig(num_samples_per_prompt=2, max_response_tokens=8),
    )
    return replace(config, **sections)


def make_experience(config: Config, share: PromptShare) -> tuple[RolloutExperience, Engine]:
    engine = Engine()
    rewards = cast(RewardPool, Rewards())
    return RolloutExperience(config, share, cast(RolloutEngine, engine), rewards), engine


# -------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("size", [1, 2, 4])
def test_replicas_share_the_prompts_of_a_step(size: int) -> None:
    """Together the same prompts whatever the number of replicas; none twice."""
    shares = [make_share(4, rank, size) for rank in range(size)]
    for expected in ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]):
        parts = [[prompt.id for prompt in share.next()] for share in shares]
        assert {len(part) for part in parts} == {4 // size}
        assert sorted(id_ for part in parts for id_ in part) == expected


def test_prompts_count_when_the_step_is_done() -> None:
    """On every replica all prompts of the step are marked, its own or not."""
    share = make_share(4, rank=1, size=2)
    share.next()
    assert share.source.num_consumed == 0
    share.mark_consumed()
    assert share.source.num_consumed == 4
    share.mark_consumed()
    assert share.source.num_consumed == 4


# -------------------------------------------------------------------------------------------- rollouts


def test_sequences_of_a_step_by_hand() -> None:
    config = make_config(algorithm=AlgorithmConfig(advantage=Advantage.group_mean))
    experience, engine = make_experience(config, make_share(2))
    result = experience.collect(5, policy_version=4, timer=StepTimer())
    assert engine.calls == [{"prompts": [0, 1], "policy_version": 4, "step": 5}]
    assert [sequence.id for sequence in result.sequences] == [0, 1, 2, 3]
    expected = [
        ([7], [10], -0.5),
        ([7], [10, 11], 0.5),
        ([7, 7], [10, 11], -0.5),
        ([7, 7], [10, 11, 12], 0.5),
    ]
    for sequence, (prompt, response, advantage) in zip(result.sequences, expected, strict=True):
        assert sequence.token_ids.tolist() == prompt + response
        assert sequence.prompt_length == len(prompt)
        assert sequence.advantages.tolist() == [advantage] * len(response)
        assert sequence.rollout_logprobs.tolist() == [-0.5 * (i + 1) for i in range(len(response))]
        assert sequence.rollout_logprobs.dtype is torch.float32
        assert sequence.loss_mask.tolist() == [True] * len(response)
    assert result.statistics == SampleStatistics(
        num_samples=4,
        reward_sum=0 + 1 + 10 + 11,
        reward_square_sum=0 + 1 + 100 + 121,
        length_sum=1 + 2 + 2 + 3,
        num_truncated=2,
        num_prompt_tokens=1 + 1 + 2 + 2,
        length_max=3,
    )


def test_rollout_and_reward_are_timed() -> None:
    now = iter(float(second) for second in range(100))
    timer = StepTimer(clock=lambda: next(now))
    experience, _ = make_experience(make_config(), make_share(2))
    experience.collect(0, policy_version=0, timer=timer)
    times = timer.finish()
    assert times["time/rollout_s"] == 1.0
    assert times["time/reward_s"] == 1.0


def test_truncated_responses_can_be_left_out() -> None:
    config = make_config(reward=RewardConfig(overlong=Overlong.mask))
    experience, _ = make_experience(config, make_share(2))
    result = experience.collect(0, policy_version=0, timer=StepTimer())
    assert [bool(sequence.loss_mask.any()) for sequence in result.sequences] == [True, False, True, False]
    assert result.statistics.num_samples == 4
    assert result.statistics.reward_sum == 22.0


def test_a_penalty_enters_advantages_but_not_the_reported_reward() -> None:
    """Lengths 1 to 3 of at most 4, the penalty begins above 2: the longest loses half a point."""
    config = make_config(
        rollout=RolloutConfig(num_samples_per_prompt=2, max_response_tokens=4),
        reward=RewardConfig(overlong=Overlong.soft_penalty, overlong_buffer_tokens=2),
        algorithm=AlgorithmConfig(advantage=Advantage.uncentred),
    )
    experience, _ = make_experience(config, make_share(2))
    result = experience.collect(0, policy_version=0, timer=StepTimer())
    advantages = [sequence.advantages[0].item() for sequence in result.sequences]
    assert advantages == [0.0, 1.0, 10.0, 10.5]
    assert result.statistics.reward_sum == 22.0
    assert [record.reward for record in result.records] == [0.0, 1.0, 10.0, 11.0]


def test_the_negative_control_permutes_rewards() -> None:
    """The same rewards on other samples, another permutation each step."""
    shuffled = make_config(
        reward=RewardConfig(shuffle=True), algorithm=AlgorithmConfig(advantage=Advantage.uncentred)
    )
    orders = []
    for step in range(4):
        experience, _ = make_experience(shuffled, make_share(8))
        result = experience.collect(step, policy_version=0, timer=StepTimer())
        orders.append([sequence.advantages[0].item() for sequence in result.sequences])
        assert sorted(orders[-1]) == sorted(10.0 * prompt + index for prompt in range(8) for index in (0, 1))
        assert result.statistics.reward_sum == sum(orders[-1])
    assert len({tuple(order) for order in orders}) == 4


def test_only_some_rollouts_are_kept_for_reading() -> None:
    experience, _ = make_experience(make_config(metrics=MetricsConfig(num_rollouts_dumped=3)), make_share(4))
    result = experience.collect(0, policy_version=4, timer=StepTimer())
    assert [(r.prompt_id, r.sample_index, r.advantage) for r in result.records] == [
        (0, 0, -0.5),
        (0, 1, 0.5),
        (1, 0, -0.5),
    ]
    assert result.records[2].policy_versions == [(4, 2)]
    assert result.records[2].mean_logprob == pytest.approx(-0.75)


def test_a_left_out_rollout_keeps_its_tokens() -> None:
    rollouts = [sample(PROMPTS[1], 0), sample(PROMPTS[2], 0)]
    kept, sequence = build_sequences(rollouts, torch.tensor([0.5, 1.5]), [False, True])
    assert kept.loss_mask.all()
    assert kept.advantages.tolist() == [0.5] * 2
    assert sequence.id == 1
    assert len(sequence) == 3 + 3
    assert not sequence.loss_mask.any()
    assert sequence.advantages.tolist() == [1.5] * 3


# ----------------------------------------------------------------------------------- demonstrations


class Tokenizer:
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) - ord("a") + 50 for character in text]


def test_demonstrations_end_with_end_of_sequence() -> None:
    tokenizer = cast(PreTrainedTokenizerBase, Tokenizer())
    result = DemonstrationExperience(make_share(2), tokenizer, 99).collect(0, 0, StepTimer())
    assert [sequence.token_ids.tolist() for sequence in result.sequences] == [
        [7, 50, 51, 99],
        [7, 7, 50, 51, 99],
    ]
    for sequence in result.sequences:
        assert len(sequence) - sequence.prompt_length == 3
        assert sequence.loss_mask.tolist() == [True] * 3
        assert sequence.advantages.tolist() == [1.0] * 3
    assert result.statistics.num_prompt_tokens == 3
    assert result.statistics.length_sum == 6
    assert result.records == []


# ---------------------------------------------------------------------------------------- evaluation


def test_evaluation_samples_k_responses_with_seeds_of_its_own() -> None:
    config = make_config(eval=EvalConfig(num_samples_per_prompt=3, temperature=0.5, top_p=0.9))
    engine = Engine()
    evaluator = Evaluator(config, PROMPTS[1:3], cast(RolloutEngine, engine), cast(RewardPool, Rewards()))
    statistics = evaluator.evaluate(policy_version=6)
    assert engine.calls == [
        {
            "prompts": [1, 2],
            "policy_version": 6,
            "step": EVAL_SEED_STEP,
            "num_samples_per_prompt": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "on_progress": None,
        }
    ]
    assert statistics.num_samples == 6
    assert statistics.reward_sum == 10 + 11 + 12 + 20 + 21 + 22
    assert statistics.num_truncated == 2
    assert statistics.length_max == 5


def test_a_replica_without_held_out_prompts_asks_nobody() -> None:
    engine = Engine()
    evaluator = Evaluator(make_config(), [], cast(RolloutEngine, engine), cast(RewardPool, Rewards()))
    assert evaluator.evaluate(policy_version=0) == SampleStatistics()
    assert engine.calls == []
