"""From prompts to training sequences: one replica's share of a step.

Everything here runs on the replica's leader alone. `RolloutExperience` samples and scores (train.mode=rl);
`DemonstrationExperience` reads demonstrations (train.mode=sft). `sample` waits for the servers, in turns with
all other ranks; `build` comes when every replica has what it waited for, and may use plain collectives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from megatron_drpo.batching.route_check import RouteCheck
from megatron_drpo.batching.sequences import build_sequences, describe_prompt
from megatron_drpo.config.schema import Config
from megatron_drpo.data.source import PromptShare
from megatron_drpo.errors import DataError, RewardError
from megatron_drpo.metrics.rollout_dump import RolloutRecord, build_record
from megatron_drpo.metrics.sample_statistics import SampleStatistics
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.rewards.control import shuffle_rewards
from megatron_drpo.rewards.overlong import compute_overlong
from megatron_drpo.rewards.pool import RewardPool
from megatron_drpo.rollout.engine import RolloutEngine, SamplingPlan
from megatron_drpo.rollout.stream import GroupStream
from megatron_drpo.step.advantages import compute_advantages
from megatron_drpo.step.dynamic_sampling import ScoredGroup, fill_share
from megatron_drpo.types import Prompt, RolloutGroup, TrainSequence

WaitUntil = Callable[[Callable[[float], bool]], None]
"""Takes a function that waits for so many seconds at most and says whether all is there."""
EVAL_SEED_STEP = -1
"""Evaluations draw from their own seeds, the same ones every time, so that they differ by the policy only."""


@dataclass(slots=True, kw_only=True)
class Experience:
    """One replica's share of a step."""

    sequences: list[TrainSequence]
    """In prompt order, samples of a prompt together."""
    statistics: SampleStatistics
    records: list[RolloutRecord] = field(default_factory=list)
    """What rollouts/ shows of this share."""


@dataclass(slots=True, kw_only=True)
class Samples:
    """What a step's training sequences are made of."""

    statistics: SampleStatistics
    groups: list[ScoredGroup] = field(default_factory=list)
    """Empty for demonstrations."""


class ExperienceSource(Protocol):
    """Makes a step's training sequences from this replica's share of its prompts."""

    @property
    def pending(self) -> list[int]:
        """Ids of prompts that were drawn, but not for the steps built so far."""
        ...

    def sample(self, step: int, policy_version: int, timer: StepTimer) -> Samples: ...

    def build(self, samples: Samples, policy_version: int) -> Experience: ...


class DemonstrationExperience:
    """train.mode=sft: prompt + `response` + end-of-sequence, unless the response writes it itself."""

    def __init__(
        self, share: PromptShare, tokenizer: PreTrainedTokenizerBase, eos_token_id: int, *, vocab_size: int
    ) -> None:
        self._share = share
        self._tokenizer = tokenizer
        self._eos = eos_token_id
        self._vocab_size = vocab_size

    @property
    def pending(self) -> list[int]:
        return []

    def sample(self, step: int, policy_version: int, timer: StepTimer) -> Samples:
        return Samples(statistics=SampleStatistics())

    def build(self, samples: Samples, policy_version: int) -> Experience:
        """
        Raises:
            DataError: the tokenizer writes an id that the model does not have; names the prompt's line.
        """
        statistics = samples.statistics
        sequences = []
        for number, prompt in enumerate(self._share.next()):
            response = self._tokenizer.encode(prompt.response or "", add_special_tokens=False)
            response_ids = response if response[-1:] == [self._eos] else [*response, self._eos]
            self._check_ids(prompt, response_ids)
            statistics.count(len(prompt.token_ids), len(response_ids), reward=0.0, truncated=False)
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

    def _check_ids(self, prompt: Prompt, response_ids: list[int]) -> None:
        for what, ids in (("prompt", prompt.token_ids), ("response", response_ids)):
            for position, token_id in enumerate(ids):
                if not 0 <= token_id < self._vocab_size:
                    raise DataError(
                        f"{describe_prompt(prompt)}: {what} token {position} is the id {token_id}, "
                        f"which is not in 0..{self._vocab_size - 1}: the tokenizer is another model's"
                    )


class RolloutExperience:
    """train.mode=rl: sample G responses per prompt, score them, give them advantages."""

    def __init__(
        self,
        config: Config,
        share: PromptShare,
        engine: RolloutEngine,
        rewards: RewardPool,
        *,
        vocab_size: int,
        num_topk: int,
        wait_until: WaitUntil,
        agree: Callable[[int], int],
        sum_over_replicas: Callable[[torch.Tensor], torch.Tensor],
        route_check: RouteCheck | None = None,
    ) -> None:
        """
        Args:
            vocab_size: of the policy; a response with another id is refused.
            num_topk: most probable ids per token that the loss asks for.
            wait_until: waits together with the other ranks until a condition holds here.
            agree: the maximum of a number over all replicas; a collective among their leaders, who take part
                in others' waiting meanwhile.
            sum_over_replicas: the sum of a tensor over all replicas; a plain collective among their leaders.
            route_check: of the experts that the update is to replay; None: it does not.
        """
        self._config = config
        self._route_check = route_check
        self._share = share
        self._engine = engine
        self._rewards = rewards
        self._vocab_size = vocab_size
        self._num_topk = num_topk
        self._wait_until = wait_until
        self._agree = agree
        self._sum_over_replicas = sum_over_replicas
        self._stream = GroupStream(
            share.num_prompts,
            config.rollout.max_staleness,
            share.next,
            lambda prompts, step: engine.submit(prompts, SamplingPlan(step=step, num_topk=num_topk)),
            config.rollout.oversampling,
        )

    @property
    def pending(self) -> list[int]:
        return self._stream.pending_prompt_ids

    def sample(self, step: int, policy_version: int, timer: StepTimer) -> Samples:
        """
        Raises:
            RewardError, RolloutError: something that must not reach the policy; names it.
        """
        statistics = SampleStatistics()

        def sample(num_prompts: int, round_index: int, is_wanted: bool) -> list[ScoredGroup]:
            with timer.phase("rollout"):
                if round_index == 0:
                    groups = self._next_groups(step, policy_version)
                else:
                    groups = self._more_groups(step, round_index, num_prompts, is_wanted)
            with timer.phase("reward"):
                return self._score(groups, step, statistics)

        dynamic = self._config.algorithm.dynamic_sampling
        if not dynamic.enabled:
            groups = sample(self._share.num_prompts, 0, True)
            return Samples(statistics=statistics, groups=groups)
        filled = fill_share(self._share.num_prompts, dynamic.max_rounds, sample=sample, agree=self._agree)
        statistics.num_groups = filled.num_sampled
        statistics.num_groups_dropped = filled.num_dropped
        statistics.num_rounds = filled.num_rounds
        return Samples(statistics=statistics, groups=filled.groups)

    def _next_groups(self, step: int, policy_version: int) -> list[RolloutGroup]:
        """A step's groups; then sampling runs ahead as far as it may."""
        self._stream.fill(step, ahead=False)
        self._wait_until(lambda timeout_s: self._stream.is_ready(policy_version, timeout_s))
        groups = self._stream.take(policy_version)
        self._stream.fill(step + 1, ahead=True)
        if self._config.rollout.max_staleness == 0 and self._stream.num_pending:
            self._engine.interrupt()  # of oversampling: what is left over goes on in the next step
        return groups

    def _more_groups(
        self, step: int, round_index: int, num_prompts: int, is_wanted: bool
    ) -> list[RolloutGroup]:
        """A further round of dynamic sampling; every replica draws, for their cursors to stay equal."""
        prompts = self._share.next(num_prompts)
        if not is_wanted:
            return []
        plan = SamplingPlan(step=step, round_index=round_index, num_topk=self._num_topk)
        return sample_all(self._engine, prompts, plan, self._wait_until)

    def build(self, samples: Samples, policy_version: int) -> Experience:
        """
        Raises:
            DataError, RewardError: something that must not reach the policy; names it.
        """
        for rollout in (rollout for item in samples.groups for rollout in item.group.rollouts):
            samples.statistics.count_staleness(rollout, policy_version)
        return self._build(samples.groups, samples.statistics)

    def _score(
        self, groups: Sequence[RolloutGroup], step: int, statistics: SampleStatistics
    ) -> list[ScoredGroup]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        num_failures = self._rewards.num_failures
        rewards = self._rewards.score(rollouts)
        statistics.num_reward_failures += self._rewards.num_failures - num_failures
        if self._config.reward.shuffle:
            rewards = shuffle_rewards(rewards, seed=self._config.seed, step=step)
        for rollout, reward in zip(rollouts, rewards, strict=True):
            if not math.isfinite(reward):
                raise RewardError(
                    f"reward {self._config.reward.name}: {describe_prompt(rollout.prompt)}, sample "
                    f"{rollout.sample_index}: it is {reward}, expected a finite number"
                )
            statistics.count_rollout(rollout, reward)
        rest = iter(rewards)
        scored = [ScoredGroup(group, [next(rest) for _ in group.rollouts]) for group in groups]
        for item in scored:
            statistics.count_group(item.group.rollouts, item.rewards)
        return scored

    def _build(self, scored: list[ScoredGroup], statistics: SampleStatistics) -> Experience:
        rollouts = [rollout for item in scored for rollout in item.group.rollouts]
        rewards = [reward for item in scored for reward in item.rewards]
        overlong = compute_overlong(rollouts, self._config.reward, self._config.rollout.max_response_tokens)
        shaped = torch.tensor(rewards) + torch.tensor(overlong.penalties)
        num_tokens = [
            0 if left_out else len(rollout.response_ids)
            for rollout, left_out in zip(rollouts, overlong.left_out, strict=True)
        ]
        shape = (len(scored), self._config.rollout.num_samples_per_prompt)
        advantages = compute_advantages(
            shaped.reshape(shape),
            self._config.algorithm.advantage,
            num_tokens_PG=torch.tensor(num_tokens, dtype=torch.int64).reshape(shape),
            sum_over_replicas=self._sum_over_replicas,
        ).flatten()
        sequences = build_sequences(
            rollouts,
            advantages,
            overlong.left_out,
            vocab_size=self._vocab_size,
            num_topk=self._num_topk,
            route_check=self._route_check,
        )
        if self._route_check is not None:
            statistics.num_fallback_sequences = sum(sequence.routes is None for sequence in sequences)
        shown = itertools.islice(
            zip(rollouts, rewards, advantages.tolist(), strict=True), self._config.metrics.num_rollouts_dumped
        )
        return Experience(
            sequences=sequences,
            statistics=statistics,
            records=[
                build_record(rollout, reward=reward, advantage=advantage)
                for rollout, reward, advantage in shown
            ],
        )


class Evaluator:
    """avg@k on this replica's share of the held-out prompts."""

    def __init__(
        self,
        config: Config,
        prompts: list[Prompt],
        engine: RolloutEngine,
        rewards: RewardPool,
        wait_until: WaitUntil,
    ) -> None:
        """
        Args:
            wait_until: see `RolloutExperience`.
        """
        self._config = config.eval
        self._prompts = prompts
        self._engine = engine
        self._rewards = rewards
        self._wait_until = wait_until

    def evaluate(self) -> SampleStatistics:
        """Sample k responses per prompt and score them; the mean reward is avg@k."""
        statistics = SampleStatistics()
        plan = SamplingPlan(
            step=EVAL_SEED_STEP,
            num_samples_per_prompt=self._config.num_samples_per_prompt,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
        )
        groups = sample_all(self._engine, self._prompts, plan, self._wait_until)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        for rollout, reward in zip(rollouts, self._rewards.score(rollouts), strict=True):
            statistics.count_rollout(rollout, reward)
        return statistics


def sample_all(
    engine: RolloutEngine, prompts: Sequence[Prompt], plan: SamplingPlan, wait_until: WaitUntil
) -> list[RolloutGroup]:
    """Sample responses to every prompt, waiting together with the other ranks; groups in order."""
    futures = [group.future for group in engine.submit(prompts, plan)]

    def is_ready(timeout_s: float) -> bool:
        waiting = wait(futures, timeout=timeout_s, return_when=FIRST_EXCEPTION).not_done
        return not waiting or any(f.done() and f.exception() is not None for f in futures)

    wait_until(is_ready)
    return [future.result() for future in futures]
