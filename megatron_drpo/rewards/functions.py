"""Finding reward functions by name, and the one place where their code is called."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ParamSpec, TypeVar

from megatron_drpo.config import RewardConfig
from megatron_drpo.errors import ConfigError
from megatron_drpo.types import Rollout

RewardFunction = Callable[[Rollout], float]

BUILTIN_REWARDS = {
    "math_verify": "megatron_drpo.rewards.math:math_verify",
    "exact_match": "megatron_drpo.rewards.exact:exact_match",
}
"""Short names; each compares the response with the prompt's `answer`."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no reward."""

    reason: str


def needs_answer(config: RewardConfig) -> bool:
    """Whether every prompt must have an `answer`; a user's function may do without."""
    return config.name in BUILTIN_REWARDS


def check_reward(config: RewardConfig) -> list[str]:
    """Problems with `reward.name` in words; empty if the function exists and takes a Rollout.

    Imports the module of a user's function.
    """
    if config.name in BUILTIN_REWARDS:
        return []
    try:
        load_reward_function(config.name)
    except ConfigError as error:
        return list(error.problems)
    return []


@cache
def load_reward_function(name: str) -> RewardFunction:
    """The function behind `reward.name`. Its module is found on sys.path or in the current directory.

    Raises:
        ConfigError: the name has another form, or there is no such module or function.
    """
    module_name, separator, function_name = BUILTIN_REWARDS.get(name, name).partition(":")
    if not (module_name and separator and function_name):
        known = ", ".join(BUILTIN_REWARDS)
        raise ConfigError(f"reward.name={name}: expected {known} or module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module = call_guarded(importlib.import_module, module_name)
    if isinstance(module, Failure):
        raise ConfigError(f"reward.name={name}: module {module_name} cannot be imported: {module.reason}")
    function = vars(module).get(function_name)
    if not callable(function):
        raise ConfigError(f"reward.name={name}: module {module_name} has no function {function_name}")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ConfigError(
            f"reward.name={name}: expected a function of one argument, the Rollout: {error}"
        ) from None
    return function


def call_guarded(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Failure:
    """Call code that is not ours; whatever it raises becomes a Failure that says what and where."""
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as error:  # noqa: BLE001  a user's code may raise anything at all
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return Failure(f"{type(error).__name__}: {error} ({frame.filename} line {frame.lineno})")
