"""Fixtures of the reward tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_drpo.types import FinishReason, Prompt, Rollout


@pytest.fixture
def make_rollout() -> Callable[..., Rollout]:
    def make(
        text: str,
        answer: str | None = "42",
        *,
        prompt_id: int = 0,
        sample_index: int = 0,
        num_tokens: int = 3,
        finish_reason: FinishReason = FinishReason.stop,
    ) -> Rollout:
        return Rollout(
            prompt=Prompt(id=prompt_id, text="What is it?", token_ids=(1, 2), answer=answer),
            sample_index=sample_index,
            response_ids=[7] * num_tokens,
            rollout_logprobs=[-0.5] * num_tokens,
            policy_versions=[0] * num_tokens,
            finish_reason=finish_reason,
            text=text,
        )

    return make
