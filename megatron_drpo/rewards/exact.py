"""Reward 1 for a response that is the answer, to the letter."""

from __future__ import annotations

from megatron_drpo.types import Rollout


def exact_match(rollout: Rollout) -> float:
    """1.0 if response and answer are the same text, white space around them aside; else 0.0.

    Raises:
        ValueError: the prompt has no answer.
    """
    if rollout.prompt.answer is None:
        raise ValueError("the prompt has no answer to compare with")
    return float(rollout.text.strip() == rollout.prompt.answer.strip())
