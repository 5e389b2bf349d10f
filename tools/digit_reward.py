"""A reward with much variance for a tiny random model: `reward.name=digit_reward:digit_share`, this folder on PYTHONPATH."""

from __future__ import annotations

from megatron_drpo.types import Rollout


def digit_share(rollout: Rollout) -> float:
    """The share of digits among the response's characters, in [0, 1]."""
    return sum(character.isdigit() for character in rollout.text) / max(len(rollout.text), 1)
