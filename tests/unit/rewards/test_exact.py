from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_drpo.rewards.exact import exact_match
from megatron_drpo.types import Rollout


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("42", "42", 1.0),
        (" 42\n", "42 ", 1.0),
        ("42.0", "42", 0.0),
        ("the answer is 42", "42", 0.0),
        ("Yes", "yes", 0.0),
        ("", "42", 0.0),
    ],
)
def test_equal_up_to_white_space_around(
    make_rollout: Callable[..., Rollout], text: str, answer: str, reward: float
) -> None:
    assert exact_match(make_rollout(text, answer)) == reward


def test_no_answer(make_rollout: Callable[..., Rollout]) -> None:
    with pytest.raises(ValueError, match="no answer"):
        exact_match(make_rollout("42", None))
