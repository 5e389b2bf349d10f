"""Reward 1 for a response whose final answer is mathematically equal to the ground truth."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_drpo.rewards.answers import Answer, find_box, read_answer, read_ground_truth, same_number
from megatron_drpo.types import Rollout

LATEX = LatexExtractionConfig(boxed_match_priority=0)  # one for all: math-verify keeps one compiled
RESPONSE_FORMATS = (LATEX, ExprExtractionConfig())
"""Where the final answer is looked for: the last \\boxed{} first, then phrases such as "the answer is", then
the last expression. Boxes that follow each other closely are one answer, a set."""

# math-verify's own limits are off (0): they are per comparison, several add up to more than the limit of a
# response, and that limit is enforced from outside by the pool. The package warns once that this is so.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_verify(rollout: Rollout) -> float:
    """1.0 if math-verify finds the response's final answer equal to the ground truth, else 0.0.

    The ground truth is a number or LaTeX, bare, between dollar signs or in \\boxed{}. Plain numbers, whatever
    their notation, are compared by `same_number`, without math-verify. A response in which no expression is
    found or can be parsed scores 0.0.

    Raises:
        ValueError: the prompt has no answer.
    """
    if rollout.prompt.answer is None:
        raise ValueError("the prompt has no answer to compare with")
    truth = read_ground_truth(rollout.prompt.answer)
    box = find_box(rollout.text)
    answer = None if box is None else read_answer(box)
    if answer is not None and answer.number is not None and truth.number is not None:
        return float(same_number(truth, answer))
    golds = _parse_truth(truth, is_percent=answer is not None and answer.is_percent)
    if answer is not None:
        parsed = _parse_boxed(answer.latex, RESPONSE_FORMATS)
        if any(not isinstance(value, str) for value in parsed):
            return float(verify(golds, parsed, timeout_seconds=0))
    return float(verify(golds, parse(rollout.text, RESPONSE_FORMATS, parsing_timeout=0), timeout_seconds=0))


def find_answer_problem(answer: str) -> str | None:
    """Why no response can match a ground truth, or none but its own spelling; None if others can."""
    truth = read_ground_truth(answer)
    if truth.number is not None:
        return None
    golds = _parse_truth(truth, is_percent=truth.is_percent)
    values = [gold for gold in golds if not isinstance(gold, str)]
    shown = reprlib.repr(answer)
    if not golds or (not values and any(character.isnumeric() for character in answer)):
        return f"expected an `answer` that math-verify can parse, found {shown}"
    if values and not verify(values, values, timeout_seconds=0):
        return f"expected an `answer` that equals itself, found {shown}"
    return None


@lru_cache(maxsize=4096)
def _parse_truth(truth: Answer, *, is_percent: bool) -> list[Any]:
    """What a ground truth may be equal to, as sympy expressions and as text. All samples of a prompt share
    it.

    Args:
        is_percent: whether the response has a percent sign; where only one side has, the sign may be missing
            or stand for the division, see `same_number`.
    """
    golds = _parse_boxed(truth.latex, (LATEX,))
    if truth.is_percent and not is_percent:
        golds = golds + _parse_boxed(f"\\frac{{{truth.latex}}}{{100}}", (LATEX,))
    elif is_percent and not truth.is_percent:
        golds = golds + _parse_boxed(f"100 \\cdot ({truth.latex})", (LATEX,))
    return golds


def _parse_boxed(latex: str, formats: Sequence[LatexExtractionConfig | ExprExtractionConfig]) -> list[Any]:
    """LaTeX, or text that has some between dollar signs, as sympy expression and as text."""
    text = latex if "$" in latex else f"\\boxed{{{latex}}}"
    return parse(text, formats, parsing_timeout=0)
