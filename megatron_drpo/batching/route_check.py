"""Routes that servers report, checked before they steer the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int

from megatron_drpo.config.schema import OnBadRoutes
from megatron_drpo.errors import DataError
from megatron_drpo.types import Rollout

if TYPE_CHECKING:
    from megatron_drpo.types import Routes


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteCheck:
    """What routes must be, and what happens if they are not."""

    num_experts: int
    on_bad: OnBadRoutes

    def check(self, number: int, rollout: Rollout) -> Routes | None:
        """A rollout's routes; None if they are bad and the router is to choose.

        Args:
            number: of the sequence, for messages.

        Raises:
            DataError: they are bad and on_bad is error; names sequence, prompt, sample, and token and layer.
        """
        problem = self._problem(rollout)
        if problem is None:
            return rollout.routes
        if self.on_bad is OnBadRoutes.fallback:
            return None
        raise DataError(
            f"sequence {number}, prompt {rollout.prompt.id} (line {rollout.prompt.id + 1}), sample "
            f"{rollout.sample_index}: {problem}. policy.on_bad_routes=fallback lets the router choose for "
            "such a sequence"
        )

    def _problem(self, rollout: Rollout) -> str | None:
        routes = rollout.routes
        if routes is None:
            return (
                "the server reported no routed experts: start it with --enable-return-routed-experts, or set "
                "policy.routing_replay=none"
            )
        num_tokens = len(rollout.prompt.token_ids) + len(rollout.response_ids)
        missed = find_route_problem(routes, self.num_experts, num_tokens)
        return None if missed is None else f"expected {missed}"


def find_route_problem(routes: Int[torch.Tensor, "L-1 M K"], num_experts: int, num_tokens: int) -> str | None:
    """What routes should be and are not, in words that complete "expected"; None if they can be right.

    Args:
        routes: of any integer dtype.
        num_tokens: L of the sequence, whose last token was never fed.
    """
    if len(routes) != num_tokens - 1:
        return f"routes of {num_tokens - 1} tokens, all but the last one, got {len(routes)}"
    wide = routes.to(torch.int32)
    is_bad = ((wide < 0) | (wide >= num_experts)).any(2)
    is_bad |= (wide.sort(2).values.diff(dim=2) == 0).any(2)
    if not is_bad.any():
        return None
    token, layer = is_bad.nonzero()[0].tolist()
    return (
        f"distinct experts of 0..{num_experts - 1}, got {wide[token, layer].tolist()} of token {token} in "
        f"mixture-of-experts layer {layer}"
    )
