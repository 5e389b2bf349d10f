"""From prompts to training sequences, with an engine and rewards whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from megatron_drpo.config.schema import (
    Advantage,
    AlgorithmConfig,
    Config,
    DataConfig,
    DynamicSamplingConfig,
    EvalConfig,
    MetricsConfig,
    Overlong,
    PolicyConfig,
    RewardConfig,
    RolloutConfig,
)
from megatron_drpo.data.source import PromptShare, PromptSource
from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.rewards.pool import RewardPool
from megatron_drpo.rollout.engine import PendingGroup, RolloutEngine, SamplingPlan
from megatron_drpo.step.experience_source import (
    EVAL_SEED_STEP,
    DemonstrationExperience,
    Evaluator,
    Experience,
    ExperienceSource,
    RolloutExperience,
    SampleStatistics,
)
from megatron_drpo.types import FinishReason, Prompt, Rollout, RolloutGroup

PROMPTS = [
    Prompt(id=number, text=f"p{number}", token_ids=(7,) * (number + 1), response="ab") for number in range(8)
]


class Engine:
    """Sample i of prompt p has p + i + 1 tokens; the last sample of a group is cut off by the limit."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def submit(self, prompts: list[Prompt], plan: SamplingPlan) -> list[PendingGroup]:
        if prompts:
            self.calls.append({"prompts": [prompt.id for prompt in prompts], "plan": plan})
        return [self._pending(prompt, plan.num_samples_per_prompt or 2) for prompt in prompts]

    def _pending(self, prompt: Prompt, num_samples: int) -> PendingGroup:
        future: Future[RolloutGroup] = Future()
        rollouts = [sample(prompt, i, num_samples) for i in range(num_samples)]
        future.set_result(RolloutGroup(prompt=prompt, rollouts=rollouts))
        return PendingGroup(prompt=prompt, policy_version=0, future=future)


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

    num_failures = 0

    def score(self, rollouts: list[Rollout]) -> list[float]:
        return [10.0 * rollout.prompt.id + rollout.sample_index for rollout in rollouts]


def wait_until(is_ready: Callable[[float], bool]) -> None:
    assert is_ready(0.0)


def collect(
    source: ExperienceSource, step: int, policy_version: int, timer: StepTimer | None = None
) -> Experience:
    return source.build(source.sample(step, policy_version, timer or StepTimer()), policy_version)


def make_share(num_prompts: int, rank: int = 0, size: int = 1) -> PromptShare:
    return PromptShare(PromptSource(PROMPTS, shuffle=False, seed=0), num_prompts, rank, size)


def make_config(**sections: Any) -> Config:
    config = Config(
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path="unused"),
        rollout=RolloutConfig(num_samples_per_prompt=2, max_response_tokens=8),
    )
    return replace(config, **sections)


def make_experience(
    config: Config, share: PromptShare, *, rewards: Any = None, engine: Any = None, **arguments: Any
) -> tuple[RolloutExperience, Engine]:
    """Of a single replica, unless `agree` and `sum_over_replicas` say otherwise."""
    engine = engine or Engine()
    alone: dict[str, Any] = {"agree": lambda value: value, "sum_over_replicas": lambda values: values}
    alone["wait_until"] = wait_until
    alone |= {"vocab_size": 100, "num_topk": 0} | arguments
    experience = RolloutExperience(
        config,
        share,
        cast(RolloutEngine, engine),
        cast(RewardPool, rewards or Rewards()),
        **alone,
    )
    return experience, engine


# -------------------------------------------------------------------------------------------- rollouts


def test_sequences_of_a_step_by_hand() -> None:
    config = make_config(algorithm=AlgorithmConfig(advantage=Advantage.group_mean))
    experience, engine = make_experience(config, make_share(2))
    result = collect(experience, 5, 4)
    assert engine.calls == [{"prompts": [0, 1], "plan": SamplingPlan(step=5)}]
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
        reward_max=11,
        reward_negated_max=0,
        num_groups_scored=2,
        num_groups_varied=2,
        length_sum=1 + 2 + 2 + 3,
        num_truncated=2,
        num_prompt_tokens=1 + 1 + 2 + 2,
        length_max=3,
        num_response_tokens=8,
    )


def test_rollout_and_reward_are_timed() -> None:
    now = iter(float(second) for second in range(100))
    timer = StepTimer(clock=lambda: next(now))
    experience, _ = make_experience(make_config(), make_share(2))
    collect(experience, 0, 0, timer)
    times = timer.finish()
    assert times["time/rollout_s"] == 1.0
    assert times["time/reward_s"] == 1.0


def test_truncated_responses_can_be_left_out() -> None:
    config = make_config(reward=RewardConfig(overlong=Overlong.mask))
    experience, _ = make_experience(config, make_share(2))
    result = collect(experience, 0, 0)
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
    result = collect(experience, 0, 0)
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
        result = collect(experience, step, 0)
        orders.append([sequence.advantages[0].item() for sequence in result.sequences])
        assert sorted(orders[-1]) == sorted(10.0 * prompt + index for prompt in range(8) for index in (0, 1))
        assert result.statistics.reward_sum == sum(orders[-1])
    assert len({tuple(order) for order in orders}) == 4


def test_only_some_rollouts_are_kept_for_reading() -> None:
    experience, _ = make_experience(make_config(metrics=MetricsConfig(num_rollouts_dumped=3)), make_share(4))
    result = collect(experience, 0, 4)
    assert [(r.prompt_id, r.sample_index, r.advantage) for r in result.records] == [
        (0, 0, -0.5),
        (0, 1, 0.5),
        (1, 0, -0.5),
    ]
    assert result.records[2].policy_versions == [(4, 2)]
    assert result.records[2].mean_logprob == pytest.approx(-0.75)


def test_reinforce_plus_plus_over_two_replicas() -> None:
    """Each replica's own prompt and the moments of both: lengths 1, 2 and 2, 3, centred rewards -1/2, 1/2."""
    config = make_config(algorithm=AlgorithmConfig(advantage=Advantage.reinforce_plus_plus))
    mean = (-0.5 * 1 + 0.5 * 2 - 0.5 * 2 + 0.5 * 3) / 8
    std = (0.25 - mean**2) ** 0.5
    for rank in range(2):
        share = make_share(2, rank, 2)
        other = torch.tensor([3.0, 0.5, 0.75] if rank else [5.0, 0.5, 1.25], dtype=torch.float64)
        experience, _ = make_experience(config, share, sum_over_replicas=other.add)
        result = collect(experience, 0, 0)
        advantages = [sequence.advantages[0].item() for sequence in result.sequences]
        assert advantages == pytest.approx([(-0.5 - mean) / std, (0.5 - mean) / std], rel=1e-6)


def test_masked_responses_do_not_enter_the_normalisation() -> None:
    """The second sample of each group is cut off and masked: only the first ones' tokens count."""
    config = make_config(
        algorithm=AlgorithmConfig(advantage=Advantage.reinforce_plus_plus),
        reward=RewardConfig(overlong=Overlong.mask),
    )
    experience, _ = make_experience(config, make_share(2))
    result = collect(experience, 0, 0)
    # All counted tokens have the centred reward -1/2: mean -1/2, variance 0, held at 1e-8.
    assert [sequence.advantages[0].item() for sequence in result.sequences] == pytest.approx([0, 1e4] * 2)


def test_rewards_that_failed_are_counted() -> None:
    class SomeFail(Rewards):
        num_failures = 5

        def score(self, rollouts: list[Rollout]) -> list[float]:
            self.num_failures += 3
            return super().score(rollouts)

    experience, _ = make_experience(make_config(), make_share(2), rewards=SomeFail())
    assert [collect(experience, step, 0).statistics.num_reward_failures for step in range(2)] == [3, 3]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_that_is_no_number_is_refused(reward: float) -> None:
    class OneBroken(Rewards):
        def score(self, rollouts: list[Rollout]) -> list[float]:
            return [*super().score(rollouts)[:-1], reward]

    experience, _ = make_experience(make_config(), make_share(2), rewards=OneBroken())
    with pytest.raises(RewardError, match=rf"prompt 1 \(line 2\), sample 1: it is {reward}, expected"):
        collect(experience, 0, 0)


def test_topk_goes_from_the_engine_into_the_sequences() -> None:
    class WithTopk(Engine):
        def submit(self, prompts: list[Prompt], plan: SamplingPlan) -> list[PendingGroup]:
            pending = super().submit(prompts, plan)
            for rollout in (r for group in pending for r in group.future.result().rollouts):
                rollout.topk_ids = [[10 + p, 3] for p in range(len(rollout.response_ids))]
                rollout.topk_logprobs = [[-0.7, -1.5 - p] for p in range(len(rollout.response_ids))]
            return pending

    experience, engine = make_experience(make_config(), make_share(2), engine=WithTopk(), num_topk=2)
    sequence = collect(experience, 0, 0).sequences[3]
    assert engine.calls[0]["plan"].num_topk == 2
    assert sequence.topk_ids is not None
    assert sequence.topk_logprobs is not None
    assert sequence.topk_ids.tolist() == [[10, 3], [11, 3], [12, 3]]
    torch.testing.assert_close(
        sequence.topk_logprobs, torch.tensor([[-0.7, -1.5], [-0.7, -2.5], [-0.7, -3.5]])
    )


# ------------------------------------------------------------------------------------ dynamic sampling


class SomeConstant(Rewards):
    """As Rewards, but all samples of the prompts given earn the same."""

    def __init__(self, *prompt_ids: int) -> None:
        self.prompt_ids = prompt_ids

    def score(self, rollouts: list[Rollout]) -> list[float]:
        return [1.0 if r.prompt.id in self.prompt_ids else float(r.sample_index) for r in rollouts]


DYNAMIC = AlgorithmConfig(dynamic_sampling=DynamicSamplingConfig(enabled=True, max_rounds=3))


def prompts_of(result: Experience) -> list[int]:
    """Of the sequences' groups: a prompt's length tells its id."""
    return [sequence.prompt_length - 1 for sequence in result.sequences[::2]]


def test_dropped_groups_are_refilled_on_one_replica() -> None:
    share = make_share(4)
    experience, engine = make_experience(make_config(algorithm=DYNAMIC), share, rewards=SomeConstant(0, 3, 5))
    result = collect(experience, 7, 0)
    # Of 0..3 half are kept, so 2 missing ones take 4; of 4..7 three are kept and one is cut.
    calls = [(call["prompts"], call["plan"].step, call["plan"].round_index) for call in engine.calls]
    assert calls == [([0, 1, 2, 3], 7, 0), ([4, 5, 6, 7], 7, 1)]
    assert prompts_of(result) == [1, 2, 4, 6]
    assert [sequence.id for sequence in result.sequences] == list(range(8))
    assert [sequence.advantages[0].item() for sequence in result.sequences] == [-0.5, 0.5] * 4
    counted = result.statistics
    assert (counted.num_rounds, counted.num_groups, counted.num_groups_dropped) == (2, 8, 3)
    assert counted.num_samples == 16, "metrics are of all that was sampled"
    share.mark_consumed()
    assert share.source.num_consumed == 8


def test_a_replica_without_any_group_takes_part_in_the_sum() -> None:
    """All of its prompts are constant; the other replica, which has one, would wait for it."""
    sums: list[list[float]] = []

    def at_least_one(value: int) -> int:
        return max(value, 1)

    def collective(values: torch.Tensor) -> torch.Tensor:
        sums.append(values.tolist())
        return values

    experience, engine = make_experience(
        make_config(algorithm=replace(DYNAMIC, advantage=Advantage.reinforce_plus_plus)),
        make_share(4, 0, 2),
        rewards=SomeConstant(0, 2, 4, 6),
        agree=at_least_one,
        sum_over_replicas=collective,
    )
    result = collect(experience, 0, 0)
    assert [call["prompts"] for call in engine.calls] == [[0, 2], [4, 6], [0, 2]]
    assert result.sequences == result.records == []
    assert result.statistics.num_rounds == 3
    assert sums == [[0.0, 0.0, 0.0]]


def test_a_penalty_does_not_make_a_group_vary() -> None:
    """Equal rewards, unequal lengths: shaped rewards would differ, the unshaped ones do not."""
    config = make_config(
        rollout=RolloutConfig(num_samples_per_prompt=2, max_response_tokens=4),
        reward=RewardConfig(overlong=Overlong.soft_penalty, overlong_buffer_tokens=4),
        algorithm=DYNAMIC,
    )
    experience, _ = make_experience(config, make_share(1), rewards=SomeConstant(0))
    assert prompts_of(collect(experience, 0, 0)) == [1]


# ----------------------------------------------------------------------------------- demonstrations


class Tokenizer:
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) - ord("a") + 50 for character in text]


def test_demonstrations_end_with_end_of_sequence() -> None:
    tokenizer = cast(PreTrainedTokenizerBase, Tokenizer())
    source = DemonstrationExperience(make_share(2), tokenizer, 99, vocab_size=100)
    result = collect(source, 0, 0)
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


def test_a_demonstration_that_writes_its_end_gets_no_second_one() -> None:
    source = DemonstrationExperience(
        make_share(1), cast(PreTrainedTokenizerBase, Tokenizer()), 51, vocab_size=100
    )
    (sequence,) = collect(source, 0, 0).sequences
    assert sequence.token_ids.tolist() == [7, 50, 51]


def test_a_tokenizer_of_another_model_is_refused() -> None:
    tokenizer = cast(PreTrainedTokenizerBase, Tokenizer())
    source = DemonstrationExperience(make_share(2), tokenizer, 99, vocab_size=51)
    with pytest.raises(
        DataError, match=r"prompt 0 \(line 1\): response token 1 is the id 51, which .* 0\.\.50"
    ):
        collect(source, 0, 0)
    source = DemonstrationExperience(make_share(2), tokenizer, 3, vocab_size=7)
    with pytest.raises(DataError, match=r"prompt 0 \(line 1\): prompt token 0 is the id 7"):
        collect(source, 0, 0)


# ---------------------------------------------------------------------------------------- evaluation


def test_evaluation_samples_k_responses_with_seeds_of_its_own() -> None:
    config = make_config(eval=EvalConfig(num_samples_per_prompt=3, temperature=0.5, top_p=0.9))
    engine = Engine()
    evaluator = Evaluator(
        config, PROMPTS[1:3], cast(RolloutEngine, engine), cast(RewardPool, Rewards()), wait_until
    )
    statistics = evaluator.evaluate()
    plan = SamplingPlan(step=EVAL_SEED_STEP, num_samples_per_prompt=3, temperature=0.5, top_p=0.9)
    assert engine.calls == [{"prompts": [1, 2], "plan": plan}]
    assert statistics.num_samples == 6
    assert statistics.reward_sum == 10 + 11 + 12 + 20 + 21 + 22
    assert statistics.num_truncated == 2
    assert statistics.length_max == 5


def test_a_replica_without_held_out_prompts_asks_nobody() -> None:
    engine = Engine()
    evaluator = Evaluator(
        make_config(), [], cast(RolloutEngine, engine), cast(RewardPool, Rewards()), wait_until
    )
    assert evaluator.evaluate() == SampleStatistics()
    assert engine.calls == []
