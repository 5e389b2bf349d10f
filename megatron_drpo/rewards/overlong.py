"""What a truncated response is worth: `reward.overlong`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_drpo.config.schema import Overlong, RewardConfig
from megatron_drpo.types import FinishReason, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlongEffect:
    """One entry per rollout."""

    penalties: list[float]
    """To be added to the rewards; in [-1, 0]."""
    left_out: list[bool]
    """True: none of its tokens contribute to the loss. Its reward still counts in the group's baseline."""


def compute_overlong(
    rollouts: Sequence[Rollout], config: RewardConfig, max_response_tokens: int
) -> OverlongEffect:
    """The effect of `reward.overlong`: `keep` none, `mask` leaves responses without an end out of the loss,
    `soft_penalty` lowers the reward of those near the limit (see `soft_penalty`)."""
    penalties = [0.0] * len(rollouts)
    left_out = [False] * len(rollouts)
    if config.overlong is Overlong.mask:
        left_out = [rollout.finish_reason is not FinishReason.stop for rollout in rollouts]
    elif config.overlong is Overlong.soft_penalty:
        buffer = config.overlong_buffer_tokens
        penalties = [soft_penalty(len(r.response_ids), max_response_tokens, buffer) for r in rollouts]
    return OverlongEffect(penalties=penalties, left_out=left_out)


def soft_penalty(length: int, max_response_tokens: int, buffer_tokens: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13).

    0 up to max_response_tokens - buffer_tokens, then linear down to -1 at max_response_tokens. All lengths in
    tokens.
    """
    excess = length - (max_response_tokens - buffer_tokens)
    return -min(max(excess / buffer_tokens, 0.0), 1.0)
