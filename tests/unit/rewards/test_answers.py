"""What final answers say; that math-verify understands the rest is in test_math.py."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.rewards.answers import Answer, find_box, read_answer, read_ground_truth, same_number


@given(
    st.integers(-(10**15), 10**15),
    st.integers(0, 6),
    st.sampled_from(["", ",", "{,}", "\\,", " ", ",\\!"]),
)
def test_decimals_with_separators_of_thousands(digits: int, num_decimals: int, separator: str) -> None:
    value = Fraction(digits, 10**num_decimals)
    whole, decimals = divmod(abs(digits), 10**num_decimals)
    text = f"{'-' * (digits < 0)}{whole:,}".replace(",", separator)
    text += f".{decimals:0{num_decimals}d}" if num_decimals else ""
    for spelling in (text, f"${text}$", f"{text}.", f"\\${text}", f"{text} dollars"):
        answer = read_answer(spelling)
        assert (answer.number, answer.is_percent) == (value, False)
        assert Fraction(answer.latex) == value
    assert read_answer(f"{text}\\%") == Answer(read_answer(text).latex, value, True)


@given(
    st.integers(-(10**6), 10**6),
    st.integers(-30, 30),
    st.sampled_from(["e%d", " \\times 10^{%d}", "*10^%d"]),
)
def test_scientific_notation(mantissa: int, exponent: int, form: str) -> None:
    answer = read_answer(f"{mantissa}{form % exponent}")
    assert answer.number == mantissa * Fraction(10) ** exponent
    assert Fraction(answer.latex) == answer.number


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("(1, 2)", "(1, 2)"),
        ("1, 2", "1, 2"),
        ("1,23", "1,23"),
        ("1,2345", "1,2345"),
        ("12 34", "12 34"),
        ("1.000.000", "1.000.000"),
        ("2^{10}", "2^{10}"),
        ("x^{2}", "x^{2}"),
        ("x²", "x^{2}"),
        ("x¹²", "x^{12}"),
        ("5 million", "5 million"),
        ("$5 million", "5 million"),
        ("10:30", "10:30"),
        ("x=5", "x=5"),
        ("A", "A"),
        ("\\text{A}", "\\text{A}"),
        ("\\text{both A and B}", "\\text{both A and B}"),
        ("0.333...", "0.333..."),
        ("3/0", "3/0"),
        ("1e1001", "1e1001"),
        ("7" * 1001, "7" * 1001),
        ("$5$ and $6$", "$5$ and $6$"),
        ("$5 and $6", "5 and 6"),
        ("x = $5", "x = 5"),
        ("\\frac{\\$x}{2}", "\\frac{\\$x}{2}"),
        ("10\\%x", "10\\%x"),
    ],
)
def test_what_is_no_plain_number_stays_latex(text: str, latex: str) -> None:
    assert read_answer(text) == Answer(latex, None, False)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She pays 3 * $6 = $<<3*6=18>>18.\n#### 18", 18),
        ("a #### 5 b #### 1,234", 1234),
        ("thus \\boxed{\\$7} is right", 7),
        ("\\boxed{6}, no: " + "I think again, " * 9 + "it is \\boxed{7}", 7),
    ],
)
def test_ground_truths_with_what_leads_to_them(text: str, number: int) -> None:
    assert read_ground_truth(text).number == number


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no box", None),
        ("\\boxed{\\frac{1}{2}} .", "\\frac{1}{2}"),
        ("\\fbox {3}", "3"),
        ("\\boxed{1} and \\boxed{2}", None),
        ("\\boxed{2} and \\boxed{2}", "2"),
        ("\\boxed{1}" + " " * 100 + "\\boxed{2}", "2"),
        ("\\boxed{1", None),
        ("\\boxed{1" + " " * 100 + "\\boxed{2}", None),
    ],
)
def test_the_last_box(text: str, content: str | None) -> None:
    assert find_box(text) == content


@pytest.mark.parametrize(
    ("truth", "response", "is_same"),
    [
        ("0.1234567", "0.123457", True),
        ("0.123456", "0.123457", False),
        ("1000000.1", "1000000.1000004", True),
        ("1e-7", "1.0009e-7", True),
        ("1e-7", "1.01e-7", False),
        ("25%", "0.25", True),
        ("25%", "25", True),
        ("25", "25%", True),
        ("0.25", "25%", True),
        ("25", "0.25", False),
        ("25%", "2500%", False),
    ],
)
def test_rounding_and_percent(truth: str, response: str, is_same: bool) -> None:
    assert same_number(read_answer(truth), read_answer(response)) is is_same


@pytest.mark.parametrize("unit", ["{", "$", "\\boxed{", " ", "1 ", "1,111", "\\text{", "US ", "\\,", "1\\%"])
def test_what_a_policy_writes_takes_no_time(unit: str) -> None:
    begin = time.perf_counter()
    text = f"\\boxed{{{unit * (60_000 // len(unit))}}}"
    box = find_box(text)
    read_answer(text if box is None else box)
    assert time.perf_counter() - begin < 5
