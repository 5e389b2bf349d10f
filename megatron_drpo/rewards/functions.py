"""Finding reward functions by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from megatron_drpo.config.schema import RewardConfig
from megatron_drpo.config.user_code import load_function
from megatron_drpo.errors import ConfigError
from megatron_drpo.types import Rollout

RewardFunction = Callable[[Rollout], float]

BUILTIN_REWARDS = {
    "math_verify": "megatron_drpo.rewards.math:math_verify",
    "exact_match": "megatron_drpo.rewards.exact:exact_match",
}
"""Short names; each compares the response with the prompt's `answer`."""


def needs_answer(config: RewardConfig) -> bool:
    """Whether every prompt must have an `answer`; a user's function may do without."""
    return config.name in BUILTIN_REWARDS


def check_reward(config: RewardConfig) -> list[str]:
    """Problems with `reward.name` in words; empty if the function exists and takes a Rollout.

    Imports the module of a user's function.
    """
    if config.name == "exact_match" and config.keep_special_tokens:
        return [
            "reward.keep_special_tokens=True: reward.name=exact_match compares the whole text, so the token "
            "that ends a response would make it wrong; that setting is for functions of your own"
        ]
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
    return load_function(
        BUILTIN_REWARDS.get(name, name),
        setting=f"reward.name={name}",
        known=", ".join(BUILTIN_REWARDS),
        argument="the Rollout",
    )
