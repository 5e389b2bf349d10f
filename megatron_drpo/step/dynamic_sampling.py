"""Groups that do not say which sample is better are replaced (DAPO, arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_drpo.errors import DataError
from megatron_drpo.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """All samples of one prompt and their rewards."""

    group: RolloutGroup
    rewards: list[float]
    """Unshaped, one per rollout."""

    @property
    def is_constant(self) -> bool:
        """All rewards are equal."""
        return len(set(self.rewards)) == 1


@dataclass(slots=True, kw_only=True)
class FilledShare:
    """What one replica got together in a step."""

    groups: list[ScoredGroup] = field(default_factory=list)
    """With rewards that differ, in prompt order."""
    num_sampled: int = 0
    """Groups, those included that were dropped or cut."""
    num_dropped: int = 0
    """Groups whose rewards were all equal."""
    num_rounds: int = 0
    """The same on all replicas."""


def fill_share(
    num_groups: int,
    max_rounds: int,
    *,
    sample: Callable[[int, int, bool], list[ScoredGroup]],
    agree: Callable[[int], int],
) -> FilledShare:
    """Sample round by round until every replica has `num_groups` groups whose rewards differ.

    A round draws as many prompts as it takes at the rate at which groups were kept so far, `num_groups` at
    most. The replica that needs most decides for all, so that they draw the same and their cursors stay
    equal; one that has enough draws its prompts too, but samples nothing. Groups over `num_groups` are cut
    in prompt order. After `max_rounds` the step goes on with what there is.

    Args:
        sample: draws so many prompts, each replica its own, in the round of this index; and their scored
            groups, in order, if the replica wants them.
        agree: the maximum of a number over the replicas; called equally often on all of them.

    Raises:
        DataError: no replica has a single group.
    """
    share = FilledShare()
    for round_index in range(max_rounds):
        num_kept = len(share.groups)
        missing = max(num_groups - num_kept, 0)
        wanted = math.ceil(missing * share.num_sampled / num_kept) if num_kept else num_groups
        num_prompts = agree(min(wanted, num_groups))
        if num_prompts == 0:
            break
        share.num_rounds += 1
        scored = sample(num_prompts, round_index, missing > 0)
        varied = [group for group in scored if not group.is_constant]
        share.num_sampled += len(scored)
        share.num_dropped += len(scored) - len(varied)
        share.groups += varied
    if agree(len(share.groups)) == 0:
        raise DataError(
            f"algorithm.dynamic_sampling: in {share.num_rounds} rounds all samples of a group had the same "
            "reward, for every group on every replica: there is nothing to learn from. Check that the reward "
            "fits the prompts' answers, take easier or harder prompts, or raise "
            "rollout.num_samples_per_prompt or algorithm.dynamic_sampling.max_rounds"
        )
    del share.groups[num_groups:]
    return share
