"""Fixtures of the reward tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`write_module(name, source)`: a user's module in the current directory, from now on a temporary one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return write
