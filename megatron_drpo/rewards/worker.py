"""What runs inside a reward worker process. Imports nothing heavy."""

from __future__ import annotations

import os
import reprlib
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import cast

from megatron_drpo.config.user_code import Failure, call_guarded
from megatron_drpo.rewards.functions import load_reward_function
from megatron_drpo.runtime.process_end import die_with_parent
from megatron_drpo.types import Rollout

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""Rewards are summed and centred in float32: a larger one would be infinite there."""


def start(reward_name: str, parent_pid: int, log: Path | None = None) -> None:
    """Tie this process to its parent's life and load the reward function, so that scoring starts warm.

    Args:
        log: where what is printed from now on is appended to, by libraries in C and child processes too, lest
            it goes over the progress display.
    """
    die_with_parent(parent_pid)
    if log is not None:
        _print_to(log)
    call_guarded(load_reward_function, reward_name)  # a failure shows again, and is told, when scoring


def _print_to(log: Path) -> None:
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
            # Line by line: a worker that is killed writes nothing that it still holds back.
            cast(TextIOWrapper, stream).reconfigure(line_buffering=True, errors="backslashreplace")


def score(reward_name: str, rollout: Rollout) -> float | Failure:
    """The reward of one response, a finite float.

    The function may return anything that float() takes, text aside: numbers of Python, NumPy or torch. What
    counts is the float, for each of those types has infinities of its own.
    """
    value = call_guarded(lambda: load_reward_function(reward_name)(rollout))
    if isinstance(value, Failure):
        return value
    number = None if isinstance(value, str | bytes | bytearray) else call_guarded(float, value)
    if isinstance(number, float) and abs(number) <= FLOAT32_MAX:
        return number
    shown = call_guarded(reprlib.repr, value)  # of an integer with thousands of digits there is none
    if isinstance(shown, Failure):
        shown = f"something of type {type(value).__name__}"
    return Failure(f"it returned {shown}, expected a finite number")


def find_answer_problem(answer: str) -> str | Failure | None:
    """Why math-verify can match no response with this ground truth; None if it can."""
    from megatron_drpo.rewards import math  # in a worker alone: it brings sympy

    return call_guarded(math.find_answer_problem, answer)
