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
    taken in a later step, when their oldest token may be one version older than without (per step's worth of
    prompts left over).
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
        self._oldest = max_staleness + math.ceil(oversampling)
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
        """Finished groups for a step; fewer than it needs while one that is due is not finished.

        As each step takes only so many, of those that come due within k further steps all that these cannot
        take are taken now (the schedule of the earliest deadline: groups lie in the order of their versions).
        """
        finished = [group for group in self._pending if group.future.done()]
        chosen: list[PendingGroup] = []
        for num_steps in range(self._oldest + 1):
            last_version = policy_version - self._oldest + num_steps
            due = [group for group in self._pending if group.policy_version <= last_version]
            num_wanted = min(len(due) - num_steps * self._num_groups, self._num_groups) - len(chosen)
            ready = [group for group in finished if group in due and group not in chosen]
            if len(ready) < num_wanted:
                return []
            chosen += ready[: max(num_wanted, 0)]
        others = [group for group in finished if group not in chosen]
        chosen += others[: self._num_groups - len(chosen)]
        return [group for group in self._pending if group in chosen]
