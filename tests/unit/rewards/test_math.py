from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from megatron_drpo.rewards.math import find_answer_problem, math_verify
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


SPELLINGS = {
    "18": r"""18 | +18 | 18. | 18.0 | 018 | $18 | \$18 | \$ 18 | 18$ | 18\$ | $18$ | $$18$$ | \(18\)
        | \[18\] | $\$18$ | $18.00 | US$18 | US\$18 | US$ 18 | C$18 | USD 18 | 18 USD | \text{US\$}18
        | \text{\$}18 | 18 dollars | 18\text{ dollars} | \text{18 dollars} | 18 \text{ dollars}.
        | \textbf{18} | **18** | €18 | 18€ | 18 € | 18\,€ | £18 | \pounds 18 | \pounds18 | ₹18 | Rs. 18
        | 18 euros | EUR 18 | ¥18 | 18 yen | $18. | $18$. | \boxed{18} | $\boxed{18}$
        | So it is \boxed{\$18}. | 9 * 2 = <<9*2=18>>18. #### 18 | 3 + 15 = 18 #### $18 | 18\text{ cm}
        | 18 \mathrm{ cm}^2 | 18^\circ | 18^{\circ} | 18° | 1.8e1 | 1.8 \times 10^1 | 36/2
        | \frac{36}{2}""",
    "1234.5": r"""1234.5 | 1,234.50 | $1,234.50 | \$1,234.50 | \$1{,}234.50 | 1{,}234.5 | 1\,234.5
        | 1 234.5 | 1,\!234.5 | $1,234.50$ | \$1,234.50. | US$1,234.50 | €1,234.50 | 1,234.50 USD
        | 1,234.5 dollars | 1.2345e3 | 1.2345E+3 | 1.2345 \times 10^{3} | 1.2345 \cdot 10^3
        | 1.2345×10^3 | 1234\frac{1}{2} | 2469/2 | \frac{2469}{2}""",
    "-1234567": r"""-1234567 | -1,234,567 | −1,234,567 | -1{,}234{,}567 | -1\,234\,567 | -1 234 567
        | -$1,234,567 | $-1,234,567 | -\$1,234,567 | - 1,234,567 | -1,234,567.00 | -1.234567e6
        | -1.234567 \times 10^6""",
    "50%": r"""50% | 50\% | 50 % | 50 \% | 50\,\% | 50.0% | $50\%$ | $50$% | 50 percent
        | 50\text{ percent} | 50\text{\%} | 50 percent. | 50 per cent | 50 pct | 100/2 % | \boxed{50\%}
        | #### 50%""",
    "0.000015": r"""0.000015 | .000015 | 1.5e-5 | 1.5E-5 | 1.5e-05 | 15e-6 | 1.5 × 10^-5
        | 1.5 \times 10^{-5} | 1.5\times10^{-5} | 1.5 \cdot 10^{-5} | 1.5*10^-5 | 1.5 x 10^-5
        | 1.5 × 10⁻⁵ | $1.5 \times 10^{-5}$ | 1.5e-5. | 3/200000 | \frac{3}{200000} | 0.0015\%""",
    "0.75": r"""0.75 | .75 | 0.75. | 3/4 | 3 / 4 | ¾ | \frac{3}{4} | \dfrac{3}{4} | \tfrac34 | \frac34
        | $\frac{3}{4}$ | $.75 | $0.75 | \$0.75 | 7.5e-1 | \boxed{\dfrac{3}{4}} | 75\%""",
    "3/2": r"""3/2 | 1.5 | 1 1/2 | 1\frac{1}{2} | 1 \frac12 | 1½ | \frac{3}{2} | \frac32 | 150\% | 1.50""",
    "10000": r"""10000 | 10,000 | 10^4 | 10^{4} | 1e4 | 1E4 | 1e+4 | $10,000 | 10{,}000 | 10\ 000""",
}
"""Ways to write a number; each is the truth, and each is the answer, of any other."""


def spellings(value: str) -> list[str]:
    return [spelling.strip() for spelling in re.split(r"\s\|\s", SPELLINGS[value])]


def test_there_are_enough_spellings() -> None:
    assert sum(len(spellings(value)) for value in SPELLINGS) > 150


@pytest.mark.parametrize("value", SPELLINGS)
def test_a_number_is_the_same_in_every_spelling(make_rollout: Callable[..., Rollout], value: str) -> None:
    """The truth in a box scores 1, so do all its other spellings, and another number scores 0."""
    written = spellings(value)
    for truth in written:
        assert find_answer_problem(truth) is None
        for spelling in (truth, *written):
            answer = spelling.rpartition("####")[2].strip()
            text = answer if "\\boxed" in answer else f"It must be \\boxed{{{answer}}}."
            assert (truth, text, math_verify(make_rollout(text, truth))) == (truth, text, 1.0)
        for other in ("17", "-18", "1234", "1234567", "5%", "0.000016", "0.7", "2/3", "1000", "0"):
            assert (truth, other, math_verify(make_rollout(f"\\boxed{{{other}}}", truth))) == (
                truth,
                other,
                0.0,
            )


@pytest.mark.parametrize(
    ("truth", "text", "score"),
    [
        # a percent sign may be missing, or be the division it stands for
        ("50%", "50", 1.0),
        ("50%", "0.5", 1.0),
        ("50%", "\\frac{1}{2}", 1.0),
        ("50%", "5000\\%", 0.0),
        ("50%", "0.5\\%", 0.0),
        ("50", "50\\%", 1.0),
        ("50", "0.5", 0.0),
        ("0.5", "50\\%", 1.0),
        ("0.5", "50", 0.0),
        ("0.5%", "0.5", 1.0),
        ("0.5%", "0.005", 1.0),
        ("0.5%", "50", 0.0),
        ("33\\frac{1}{3}\\%", "\\frac{1}{3}", 1.0),
        ("\\sqrt{2}\\%", "\\sqrt{2}\\%", 1.0),
        ("\\sqrt{2}\\%", "\\sqrt{2}", 1.0),
        ("\\sqrt{2}\\%", "\\frac{\\sqrt{2}}{100}", 1.0),
        ("\\frac{\\sqrt{2}}{100}", "\\sqrt{2}\\%", 1.0),
        ("\\sqrt{2}\\%", "\\sqrt{3}\\%", 0.0),
        # as far as six decimals go, and no further than they mean anything
        ("1/3", "0.333333", 1.0),
        ("1/3", "0.33333", 0.0),
        ("0.333333", "\\frac{1}{3}", 1.0),
        ("1e-9", "2e-9", 0.0),
        ("1e-9", "1.0 \\times 10^{-9}", 1.0),
        ("0", "1e-9", 0.0),
        ("0", "0.00", 1.0),
        ("1.5e-5", "1.6e-5", 0.0),
        ("1.5e-5", "-1.5e-5", 0.0),
        ("1.5e-5", "1.5e5", 0.0),
        # separators of thousands are not those of a list
        ("1,234", "1234", 1.0),
        ("1, 234", "\\{1, 234\\}", 1.0),
        ("1,23", "123", 0.0),
        ("1,234", "1.234", 0.0),
        ("$1,234.50", "1234.05", 0.0),
        # what is no plain number is math-verify's as before, in a tidier spelling
        ("2√3", "2\\sqrt{3}", 1.0),
        ("2π", "2\\pi", 1.0),
        ("x²+1", "1+x^2", 1.0),
        ("x = $5", "5", 1.0),
        ("$5$ and $6$", "5, 6", 1.0),
        ("$5 and $6", "5, 6", 1.0),
        ("The answer is $5$.", "5", 1.0),
        ("\\frac{\\$5}{2}", "2.5", 1.0),
        ("(3, \\$5)", "(3,5)", 1.0),
        ("\\text{odd}.", "\\text{odd}", 1.0),
        ("-\\sqrt{2}.", "-\\sqrt{2}", 1.0),
        ("-\\sqrt{2}", "-\\sqrt{2}.", 1.0),
        ("72", "\\text{I do not know, 72 or 73}", 0.0),
    ],
)
def test_usual_equivalents(make_rollout: Callable[..., Rollout], truth: str, text: str, score: float) -> None:
    assert find_answer_problem(truth) is None
    assert math_verify(make_rollout(f"so \\boxed{{{truth}}}", truth)) == 1.0
    assert math_verify(make_rollout(f"so \\boxed{{{text}}}", truth)) == score


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("So the answer is $18.", "$18"),
        ("So the answer is 50%.", "50%"),
        ("The answer is $1,234.50", "1234.5"),
        ("so it costs \\boxed{\\$18} \\quad", "18 dollars"),
        ("\\fbox{18}", "$18"),
        ("\\boxed{$18}, that is \\boxed{$18}", "18"),
    ],
)
def test_around_and_without_a_box(make_rollout: Callable[..., Rollout], text: str, truth: str) -> None:
    assert math_verify(make_rollout(text, truth)) == 1.0


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("#### ", "expected an `answer` that math-verify can parse, found '#### '"),
        ("\\boxed{}", "expected an `answer` that math-verify can parse, found '\\\\boxed{}'"),
        ("3 \\frac{", "expected an `answer` that math-verify can parse, found '3 \\\\frac{'"),
        ("1/0", "expected an `answer` that equals itself, found '1/0'"),
    ],
)
def test_a_truth_that_nothing_matches(answer: str, problem: str) -> None:
    assert find_answer_problem(answer) == problem


def test_no_answer(make_rollout: Callable[..., Rollout]) -> None:
    with pytest.raises(ValueError, match="no answer"):
        math_verify(make_rollout("42", None))
