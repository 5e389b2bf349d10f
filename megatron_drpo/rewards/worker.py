"""What runs inside a reward worker process. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import reprlib
import signal
import sys
from numbers import Real

from megatron_drpo.rewards.functions import Failure, call_guarded, load_reward_function
from megatron_drpo.types import Rollout

PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def start(reward_name: str, parent_pid: int) -> None:
    """Tie this process to its parent's life and load the reward function, so that scoring starts warm."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # the parent died before the line above
        os._exit(1)
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
