"""The negative control `reward.shuffle`: rewards that say nothing about the responses."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_drpo.data.seeding import seeded_permutation


def shuffle_rewards(rewards: Sequence[float], *, seed: int, step: int) -> list[float]:
    """The same rewards in an order that depends on their number, `seed` and `step` only.

    A step keeps its mean reward and loses all information about which response earned what, so a run whose
    accuracy still rises learns from something else than the reward.
    """
    return [rewards[index] for index in seeded_permutation(len(rewards), seed, step)]
