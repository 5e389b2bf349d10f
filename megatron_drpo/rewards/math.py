"""Reward 1 for a response whose final answer is mathematically equal to the ground truth."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

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

    The ground truth is a number or LaTeX, bare, between dollar signs or in \\boxed{}. A response in which
    no expression is found or can be parsed scores 0.0.

    Raises:
        ValueError: the prompt has no answer.
    """
    if rollout.prompt.answer is None:
        raise ValueError("the prompt has no answer to compare with")
    response = parse(rollout.text, RESPONSE_FORMATS, parsing_timeout=0)
    return float(verify(_parse_answer(rollout.prompt.answer), response, timeout_seconds=0))


@lru_cache(maxsize=4096)
def _parse_answer(answer: str) -> list[Any]:
    """The ground truth as sympy expression and as text. All samples of a prompt share it."""
    is_marked = "\\boxed" in answer or "$" in answer
    text = answer if is_marked else f"\\boxed{{{answer}}}"
    return parse(text, (LATEX,), parsing_timeout=0)
