"""What is counted of the responses of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from megatron_drpo.types import FinishReason, Rollout


@dataclass(slots=True, kw_only=True)
class SampleStatistics:
    """Of all responses sampled; `add_up` adds replicas' or steps'."""

    num_samples: float = 0.0
    reward_sum: float = 0.0
    reward_square_sum: float = 0.0
    reward_max: float = -math.inf
    reward_negated_max: float = -math.inf
    """Minus the least reward."""
    num_reward_failures: float = 0.0
    """Responses that score 0 because the reward failed or took too long."""
    length_sum: float = 0.0
    num_truncated: float = 0.0
    num_prompt_tokens: float = 0.0
    length_max: float = 0.0
    num_groups_scored: float = 0.0
    num_groups_varied: float = 0.0
    """Whose rewards are not all equal."""
    num_groups_identical: float = 0.0
    """Of several samples, all of them the same tokens."""
    num_groups: float = 0.0
    """Sampled, as the next two with dynamic sampling only."""
    num_groups_dropped: float = 0.0
    """Because their rewards were all equal."""
    num_rounds: float = 0.0
    num_response_tokens: float = 0.0
    """Of the groups that are trained, as the next two."""
    staleness_sum: float = 0.0
    """Of all response tokens: policy versions between sampling and training."""
    staleness_max: float = 0.0
    num_fallback_sequences: float = 0.0
    """Whose routes could not be replayed."""

    def count(self, num_prompt_tokens: int, length: int, *, reward: float, truncated: bool) -> None:
        """One response."""
        self.num_samples += 1
        self.reward_sum += reward
        self.reward_square_sum += reward * reward
        self.reward_max = max(self.reward_max, reward)
        self.reward_negated_max = max(self.reward_negated_max, -reward)
        self.length_sum += length
        self.num_truncated += truncated
        self.num_prompt_tokens += num_prompt_tokens
        self.length_max = max(self.length_max, length)

    def count_rollout(self, rollout: Rollout, reward: float) -> None:
        """One scored response."""
        truncated = rollout.finish_reason is not FinishReason.stop
        self.count(
            len(rollout.prompt.token_ids), len(rollout.response_ids), reward=reward, truncated=truncated
        )

    def count_group(self, rollouts: Sequence[Rollout], rewards: Sequence[float]) -> None:
        """All scored responses to one prompt."""
        self.num_groups_scored += 1
        self.num_groups_varied += len(set(rewards)) > 1
        responses = {tuple(rollout.response_ids) for rollout in rollouts}
        self.num_groups_identical += len(rollouts) > 1 and len(responses) == 1

    def count_staleness(self, rollout: Rollout, policy_version: int) -> None:
        """One response that is trained."""
        ages = [policy_version - version for version in rollout.policy_versions]
        self.num_response_tokens += len(ages)
        self.staleness_sum += sum(ages)
        self.staleness_max = max(self.staleness_max, *ages, 0)


_MAXIMA = ("reward_max", "reward_negated_max", "length_max", "num_rounds", "staleness_max")
"""Fields whose total is the maximum."""


def add_up(parts: Iterable[SampleStatistics]) -> SampleStatistics:
    """Sums, and the maxima of what is a maximum; of at least one part."""
    parts = list(parts)
    totals = {}
    for f in fields(SampleStatistics):
        values = [getattr(part, f.name) for part in parts]
        totals[f.name] = max(values) if f.name in _MAXIMA else sum(values)
    return SampleStatistics(**totals)
