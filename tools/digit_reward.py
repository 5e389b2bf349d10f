"""A reward that varies among the responses of a tiny random model, for runs that only have to be runs."""

from __future__ import annotations

from megatron_drpo.types import Rollout


def digit_share(rollout: Rollout) -> float:
    """The share of digits among the response's characters, in [0, 1]."""
    return sum(character.isdigit() for character in rollout.text) / max(len(rollout.text), 1)
