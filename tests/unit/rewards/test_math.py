from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_drpo.rewards.math import math_verify
from megatron_drpo.types import Rollout


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("-7", "-7"),
        ("so the answer is 42.", "42"),
        ("The answer is $42$.", "42"),
        ("3 + 4 = 7, hence \\boxed{42}", "42"),
        ("\\boxed{41}. I must check that again. It is \\boxed{42}.", "42"),
        ("\\boxed{1} and \\boxed{2}", "\\{1, 2\\}"),
        ("\\boxed{42} because 6 * 7 is what you get from 6 and 7", "42"),
        ("\\boxed{1/2}", "\\frac{1}{2}"),
        ("\\boxed{\\frac{2}{4}}", "0.5"),
        ("\\boxed{0.5}", "$\\frac{1}{2}$"),
        ("\\boxed{2\\sqrt{2}}", "\\boxed{\\sqrt{8}}"),
        ("\\boxed{(x+1)^2}", "x^2+2x+1"),
        ("\\boxed{1,000}", "1000"),
        ("\\boxed{\\text{odd}}", "\\text{odd}"),
        ("\\boxed{(1, 2)}", "(1,2)"),
    ],
)
def test_equal_answers(make_rollout: Callable[..., Rollout], text: str, answer: str) -> None:
    assert math_verify(make_rollout(text, answer)) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("43", "42"),
        ("-42", "42"),
        ("", "42"),
        ("I do not know", "42"),
        ("\\boxed{43}, although 42 was close: 42", "42"),
        ("\\boxed{41} or \\boxed{42}", "42"),
        ("\\boxed{\\frac{1}{", "\\frac{1}{2}"),
        ("\\boxed{(2, 1)}", "(1,2)"),
        ("{{{{$$\\(\\(", "42"),
    ],
)
def test_other_answers_and_broken_latex(make_rollout: Callable[..., Rollout], text: str, answer: str) -> None:
    assert math_verify(make_rollout(text, answer)) == 0.0


def test_no_answer(make_rollout: Callable[..., Rollout]) -> None:
    with pytest.raises(ValueError, match="no answer"):
        math_verify(make_rollout("42", None))
