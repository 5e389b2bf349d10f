"""After an update: the policy's weights to the fleet, and to every replica the names of who has them."""

from __future__ import annotations

import torch.distributed as dist

from megatron_drpo.policy.policy import Policy
from megatron_drpo.rollout.engine import RolloutEngine
from megatron_drpo.step.colocation import SharedDevices
from megatron_drpo.weight_sync.control import FleetControl


class WeightPublisher:
    """Every method is collective over all ranks: the export gathers shards of all of them."""

    def __init__(
        self,
        policy: Policy,
        *,
        control: FleetControl | None,
        engine: RolloutEngine | None,
        devices: SharedDevices | None = None,
    ) -> None:
        """
        Args:
            control: on global rank 0.
            engine: on replica leaders.
            devices: with rollout.colocated.
        """
        self._devices = devices
        self._policy = policy
        self._control = control
        self._engine = engine
        self._version = 0

    def publish(self, policy_version: int) -> None:
        """Make the fleet serve the current weights as `policy_version`. No replica samples before it returns.

        Raises:
            WeightSyncError, RolloutError: on global rank 0: no server could be given them.
        """
        self._version = policy_version
        self._give(is_new=True)

    def repair(self) -> None:
        """Give the current weights to servers that lack them, while the others go on."""
        self._give(is_new=False)

    def take_messages(self) -> list[str]:
        """What a person should hear of the fleet, each once; on global rank 0."""
        if self._control is None:
            return []
        messages = list(self._control.messages)
        self._control.messages.clear()
        return messages

    def wants_repair(self) -> bool:
        """On global rank 0: whether there is such a server."""
        return self._control is not None and self._control.wants_repair()

    def _give(self, *, is_new: bool) -> None:
        if self._devices is not None:
            self._devices.before_push()
        if is_new and self._engine is not None:
            self._engine.expect_update()
        tensors = self._policy.hf_tensors()
        current: list[list[str] | None] = [None]
        if self._control is not None:
            give = self._control.push if is_new else self._control.repair
            give(tensors, self._version)
        else:
            for _ in tensors:
                pass
        if self._devices is not None:
            self._devices.after_push()
        if self._control is not None:
            current = [self._control.current]
        dist.broadcast_object_list(current, src=0)
        if self._engine is not None and current[0] is not None:
            self._engine.set_servers(current[0], self._version)
