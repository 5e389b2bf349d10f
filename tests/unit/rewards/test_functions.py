from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_drpo.config.schema import RewardConfig
from megatron_drpo.errors import ConfigError
from megatron_drpo.rewards.exact import exact_match
from megatron_drpo.rewards.functions import (
    check_reward,
    load_reward_function,
    needs_answer,
)
from megatron_drpo.rewards.math import math_verify
from megatron_drpo.types import Rollout

WriteModule = Callable[[str, str], None]


def test_builtin_rewards_need_an_answer() -> None:
    assert load_reward_function("math_verify") is math_verify
    assert load_reward_function("exact_match") is exact_match
    for name in ("math_verify", "exact_match"):
        assert check_reward(RewardConfig(name=name)) == []
        assert needs_answer(RewardConfig(name=name))


def test_an_exact_match_with_special_tokens_never_is() -> None:
    (problem,) = check_reward(RewardConfig(name="exact_match", keep_special_tokens=True))
    assert problem.startswith(
        "reward.keep_special_tokens=True: reward.name=exact_match compares the whole text"
    )
    assert check_reward(RewardConfig(name="math_verify", keep_special_tokens=True)) == []


def test_users_function_in_the_current_directory(
    write_module: WriteModule, make_rollout: Callable[..., Rollout]
) -> None:
    write_module("reward_length", "def score(rollout, scale=2.0):\n    return scale * len(rollout.text)\n")
    config = RewardConfig(name="reward_length:score")
    assert check_reward(config) == []
    assert not needs_answer(config)
    assert load_reward_function(config.name)(make_rollout("abc")) == 6.0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("math-verify", "expected math_verify, exact_match or module:function"),
        (":score", "expected math_verify, exact_match or module:function"),
        ("reward_absent:score", "module reward_absent cannot be imported: ModuleNotFoundError"),
        ("reward_raises:score", "ZeroDivisionError: division by zero .*reward_raises.py line 2"),
        ("reward_exits:score", "cannot be imported: SystemExit: 3"),
        ("reward_wrong:scor", "module reward_wrong has no function scor"),
        ("reward_wrong:LIMIT", "module reward_wrong has no function LIMIT"),
        ("reward_wrong:score", "expected a function of one argument, the Rollout: .*'answer'"),
    ],
)
def test_problems_name_the_value_and_the_rule(write_module: WriteModule, name: str, problem: str) -> None:
    write_module("reward_raises", "\n1 / 0\n")
    write_module("reward_exits", "raise SystemExit(3)\n")
    write_module("reward_wrong", "LIMIT = 3\ndef score(rollout, answer):\n    return 0.0\n")
    (sentence,) = check_reward(RewardConfig(name=name))
    assert sentence.startswith(f"reward.name={name}: ")
    with pytest.raises(ConfigError, match=problem):
        load_reward_function(name)
