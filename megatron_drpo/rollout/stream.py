"""Groups in flight: how far sampling may run ahead of training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait

from megatron_drpo.rollout.engine import PendingGroup
from megatron_drpo.types import Prompt, RolloutGroup

Submit = Callable[[list[Prompt], int], list[PendingGroup]]
"""Prompts and the step they are drawn for to groups in flight."""


class GroupStream:
    """A bounded buffer of groups, in flight or finished, in the order of their prompts.

    With `max_staleness` n a step's groups are submitted n steps early. A group whose oldest token would be
    more than n policy versions old in the next step is taken in this one, whether it is slow or not; beyond
    those the first to finish are taken. So n = 0 is synchronous, n = 1 takes what was submitted one step
    before, and from n = 2 on a slow group holds up nobody until it comes due.

    With `oversampling`, more prompts than a step needs are in flight, and the slowest are left over. They are
    taken in a later step, when their oldest token may be one version older than without.
    """

    def __init__(
        self,
        num_groups: int,
        max_staleness: int,
        draw: Callable[[int], list[Prompt]],
        submit: Submit,
        oversampling: float = 0.0,
    ) -> None:
        """
        Args:
            num_groups: taken per step.
            draw: the next prompts, that many; called as often with the same numbers on every replica.
        """
        self._num_groups = num_groups
        self._num_ahead = max_staleness * num_groups
        self._oldest = max_staleness + (oversampling > 0)
        self._num_extra = math.ceil(num_groups * oversampling)
        self._draw = draw
        self._submit = submit
        self._pending: list[PendingGroup] = []

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def pending_prompt_ids(self) -> list[int]:
        """Of the groups submitted and not taken."""
        return [group.prompt.id for group in self._pending]

    def fill(self, step: int, *, ahead: bool) -> None:
        """Submit what is missing for this step, and with `ahead` what may be in flight beyond it."""
        wanted = self._num_ahead if ahead else self._num_groups
        missing = wanted + self._num_extra - len(self._pending)
        if wanted and missing > 0:
            self._pending += self._submit(self._draw(missing), step)

    def is_ready(self, policy_version: int, timeout_s: float) -> bool:
        """Whether a step's groups can be taken; waits for it so long at most.

        Raises:
            RolloutError: a group failed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            for group in self._pending:
                if group.future.done() and (error := group.future.exception()) is not None:
                    raise error
            if len(self._choose(policy_version)) == self._num_groups:
                return True
            remaining = deadline - time.monotonic()
            running = [group.future for group in self._pending if not group.future.done()]
            if remaining <= 0 or not running:
                return False
            wait(running, timeout=remaining, return_when=FIRST_COMPLETED)

    def take(self, policy_version: int) -> list[RolloutGroup]:
        """A step's groups, in the order of their prompts; call it when `is_ready`."""
        chosen = self._choose(policy_version)
        self._pending = [group for group in self._pending if group not in chosen]
        return [group.future.result() for group in chosen]

    def close(self) -> None:
        """End what is in flight."""
        for group in self._pending:
            group.future.cancel()
        self._pending = []

    def _choose(self, policy_version: int) -> list[PendingGroup]:
        """Finished groups for a step; fewer than it needs while one that is due is not finished."""
        due_version = policy_version - self._oldest
        is_due = [group.policy_version <= due_version for group in self._pending]
        due = [g for g, d in zip(self._pending, is_due, strict=True) if d][: self._num_groups]
        if not all(group.future.done() for group in due):
            return []
        others = [g for g in self._pending if g not in due and g.future.done()]
        chosen = due + others[: self._num_groups - len(due)]
        return [group for group in self._pending if group in chosen]
