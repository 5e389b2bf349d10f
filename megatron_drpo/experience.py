"""From prompts to training sequences: one replica's share of a step.

Everything here runs on the replica's leader alone. `RolloutExperience` samples and scores (train.mode=rl);
`DemonstrationExperience` reads demonstrations (train.mode=sft).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from megatron_drpo.advantages import compute_advantages
from megatron_drpo.config import Config
from megatron_drpo.data.source import PromptSource
from megatron_drpo.metrics.rollout_dump import RolloutRecord, build_record
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.rewards.control import shuffle_rewards
from megatron_drpo.rewards.overlong import compute_overlong
from megatron_drpo.rewards.pool import RewardPool
from megatron_drpo.rollout.engine import RolloutEngine
from megatron_drpo.types import FinishReason, Prompt, Rollout, RolloutGroup, TrainSequence

EVAL_SEED_STEP = -1
"""Evaluations draw from their own seeds, the same ones every time, so that they differ by the policy only."""


@dataclass(slots=True, kw_only=True)
class SampleStatistics:
    """Sums over samples, to be added up over replicas."""

    num_samples: float = 0.0
    reward_sum: float = 0.0
    reward_square_sum: float = 0.0
    length_sum: float = 0.0
    num_truncated: float = 0.0
    num_prompt_tokens: float = 0.0
    length_max: float = 0.0


@dataclass(slots=True, kw_only=True)
class Experience:
    """One replica's share of a step."""

    sequences: list[TrainSequence]
    """In prompt order, samples of a prompt together."""
    statistics: SampleStatistics
    records: list[RolloutRecord] = field(default_factory=list)
    """What rollouts/ shows of this share."""


class ExperienceSource(Protocol):
    """Makes a step's training sequences from this replica's share of its prompts."""

    def collect(self, step: int, policy_version: int, timer: StepTimer) -> Experience: ...


class PromptShare:
    """Hands out this replica's prompts of each step: every data_size-th, so that the groups of an update are
    the same set whatever the number of replicas."""

    def __init__(self, source: PromptSource, num_prompts: int, rank: int, size: int) -> None:
        self.source = source
        self._num_prompts = num_prompts
        self._rank = rank
        self._size = size
        self._handed_out: list[int] = []

    def next(self) -> list[Prompt]:
        prompts = self.source.next_batch(self._num_prompts)
        self._handed_out = [prompt.id for prompt in prompts]
        return prompts[self._rank :: self._size]

    def mark_consumed(self) -> None:
        """The step is done: its prompts count."""
        self.source.mark_consumed(self._handed_out)
        self._handed_out = []


class DemonstrationExperience:
    """train.mode=sft: prompt + `response` + end-of-sequence."""

    def __init__(self, share: PromptShare, tokenizer: PreTrainedTokenizerBase, eos_token_id: int) -> None:
        self._share = share
        self._tokenizer = tokenizer
        self._eos = eos_token_id

    def collect(self, step: int, policy_version: int, timer: StepTimer) -> Experience:
        statistics = SampleStatistics()
        sequences = []
        for number, prompt in enumerate(self._share.next()):
            response = self._tokenizer.encode(prompt.response or "", add_special_tokens=False)
            response_ids = [*response, self._eos]
            _count(statistics, prompt, len(response_ids), reward=0.0, truncated=False)
            sequences.append(
                TrainSequence(
                    id=number,
                    token_ids=torch.tensor([*prompt.token_ids, *response_ids]),
                    prompt_length=len(prompt.token_ids),
                    advantages=torch.ones(len(response_ids)),
                    rollout_logprobs=torch.zeros(len(response_ids)),
                    loss_mask=torch.ones(len(response_ids), dtype=torch.bool),
                )
            )
        return Experience(sequences=sequences, statistics=statistics)


class RolloutExperience:
    """train.mode=rl: sample G responses per prompt, score them, give them advantages."""

    def __init__(
        self, config: Config, share: PromptShare, engine: RolloutEngine, rewards: RewardPool
    ) -> None:
        self._config = config
        self._share = share
        self._engine = engine
        self._rewards = rewards

    def collect(self, step: int, policy_version: int, timer: StepTimer) -> Experience:
        with timer.phase("rollout"):
            groups = self._engine.generate(self._share.next(), policy_version=policy_version, step=step)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        with timer.phase("reward"):
            rewards = self._score(rollouts, step)
        return self._build(groups, rollouts, rewards)

    def _score(self, rollouts: list[Rollout], step: int) -> list[float]:
        rewards = self._rewards.score(rollouts)
        if self._config.reward.shuffle:
            rewards = shuffle_rewards(rewards, seed=self._config.seed, step=step)
        return rewards

    def _build(self, groups: list[RolloutGroup], rollouts: list[Rollout], rewards: list[float]) -> Experience:
        limit = self._config.rollout.max_response_tokens
        overlong = compute_overlong(rollouts, self._config.reward, limit)
        shaped = torch.tensor(rewards) + torch.tensor(overlong.penalties)
        advantages_PG = compute_advantages(shaped.reshape(len(groups), -1), self._config.algorithm.advantage)
        advantages = advantages_PG.flatten()
        statistics = SampleStatistics()
        for rollout, reward in zip(rollouts, rewards, strict=True):
            truncated = rollout.finish_reason is not FinishReason.stop
            _count(statistics, rollout.prompt, len(rollout.response_ids), reward=reward, truncated=truncated)
        shown = zip(rollouts, rewards, advantages.tolist(), strict=True)
        return Experience(
            sequences=build_sequences(rollouts, advantages, overlong.left_out),
            statistics=statistics,
            records=[
                build_record(rollout, reward=reward, advantage=advantage)
                for rollout, reward, advantage in itertools.islice(
                    shown, self._config.metrics.num_rollouts_dumped
                )
            ],
        )


def build_sequences(
    rollouts: list[Rollout], advantages: torch.Tensor, left_out: list[bool]
) -> list[TrainSequence]:
    """Scored rollouts as training sequences; every response token gets its sample's advantage.

    Each field is one tensor, cut up: a tensor of its own per rollout and field would cost more than packing.
    """
    token_ids = [[*rollout.prompt.token_ids, *rollout.response_ids] for rollout in rollouts]
    lengths = [len(ids) for ids in token_ids]
    response_lengths = [len(rollout.response_ids) for rollout in rollouts]
    repeats = torch.tensor(response_lengths)
    logprobs = itertools.chain.from_iterable(rollout.rollout_logprobs for rollout in rollouts)
    kept = ~torch.tensor(left_out, dtype=torch.bool)
    columns = zip(
        torch.tensor(list(itertools.chain.from_iterable(token_ids))).split(lengths),
        advantages.float().repeat_interleave(repeats).split(response_lengths),
        torch.tensor(list(logprobs), dtype=torch.float32).split(response_lengths),
        kept.repeat_interleave(repeats).split(response_lengths),
        strict=True,
    )
    return [
        TrainSequence(
            id=number,
            token_ids=ids_L,
            prompt_length=len(rollouts[number].prompt.token_ids),
            advantages=advantages_R,
            rollout_logprobs=logprobs_R,
            loss_mask=mask_R,
        )
        for number, (ids_L, advantages_R, logprobs_R, mask_R) in enumerate(columns)
    ]


class Evaluator:
    """avg@k on this replica's share of the held-out prompts."""

    def __init__(
        self, config: Config, prompts: list[Prompt], engine: RolloutEngine, rewards: RewardPool
    ) -> None:
        self._config = config.eval
        self._prompts = prompts
        self._engine = engine
        self._rewards = rewards

    def evaluate(
        self, policy_version: int, on_progress: Callable[[int], None] | None = None
    ) -> SampleStatistics:
        """Sample k responses per prompt and score them; the mean reward is avg@k."""
        statistics = SampleStatistics()
        if not self._prompts:
            return statistics
        groups = self._engine.generate(
            self._prompts,
            policy_version=policy_version,
            step=EVAL_SEED_STEP,
            num_samples_per_prompt=self._config.num_samples_per_prompt,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            on_progress=on_progress,
        )
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        for rollout, reward in zip(rollouts, self._rewards.score(rollouts), strict=True):
            truncated = rollout.finish_reason is not FinishReason.stop
            _count(statistics, rollout.prompt, len(rollout.response_ids), reward=reward, truncated=truncated)
        return statistics


def _count(
    statistics: SampleStatistics, prompt: Prompt, length: int, *, reward: float, truncated: bool
) -> None:
    statistics.num_samples += 1
    statistics.reward_sum += reward
    statistics.reward_square_sum += reward * reward
    statistics.length_sum += length
    statistics.num_truncated += truncated
    statistics.num_prompt_tokens += len(prompt.token_ids)
    statistics.length_max = max(statistics.length_max, length)
