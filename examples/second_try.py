"""Rollouts of two turns: who adds wrongly is asked once more. The recipe is `second_try.yaml`.

`ask` makes each rollout, `score` is its reward. The recipe names both, and they are found from the
folder in which `megatron-drpo train` is called.
"""

from __future__ import annotations

from megatron_drpo.rollout.conversation import Conversation
from megatron_drpo.types import Rollout

MAX_ANSWER_TOKENS = 5


async def ask(conversation: Conversation) -> None:
    """One answer and, if it is wrong, the question again and another answer.

    The second question is context: it is never trained, for the policy did not say it.
    """
    answer = await conversation.sample(max_tokens=MAX_ANSWER_TOKENS)
    text = conversation.tokenizer.decode(answer, skip_special_tokens=True)
    if text != conversation.prompt.answer:
        conversation.insert(conversation.prompt.token_ids)
        await conversation.sample(max_tokens=MAX_ANSWER_TOKENS)


def score(rollout: Rollout) -> float:
    """1 for the right sum at once, 0.5 for the right sum at the second try, else 0."""
    first, _, second = rollout.text.partition(rollout.prompt.text)
    if first == rollout.prompt.answer:
        return 1.0
    return 0.5 if second == rollout.prompt.answer else 0.0
