"""What runs inside a reward worker process. Imports nothing heavy."""

from __future__ import annotations

import reprlib
import sys
from numbers import Real

from megatron_drpo.lifetime import die_with_parent
from megatron_drpo.rewards.functions import load_reward_function
from megatron_drpo.types import Rollout
from megatron_drpo.user_code import Failure, call_guarded


def start(reward_name: str, parent_pid: int) -> None:
    """Tie this process to its parent's life and load the reward function, so that scoring starts warm."""
    die_with_parent(parent_pid)
    call_guarded(load_reward_function, reward_name)  # a failure shows again, and is told, when scoring


def score(reward_name: str, rollout: Rollout) -> float | Failure:
    """The reward of one response, a finite float."""
    value = call_guarded(lambda: load_reward_function(reward_name)(rollout))
    if isinstance(value, Failure):
        return value
    largest = sys.float_info.max
    if not isinstance(value, Real) or not -largest <= value <= largest:
        return Failure(f"it returned {reprlib.repr(value)}, expected a finite number")
    return float(value)
