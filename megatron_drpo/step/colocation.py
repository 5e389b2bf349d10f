"""rollout.colocated: trainer and servers take turns on the same devices.

sampling             servers: weights, cache                    trainer: nothing
`to_trainer`         nothing                                    all
update               nothing                                    all
`before_push`        weights (undefined)                        weights
the push             weights                                    weights
`after_push`         weights, cache                             nothing
"""

from __future__ import annotations

import torch.distributed as dist

from megatron_drpo.policy.offload import MemoryPart
from megatron_drpo.policy.policy import Policy
from megatron_drpo.rollout.engine import RolloutEngine
from megatron_drpo.weight_sync.control import FleetControl


class SharedDevices:
    """Who has the devices' memory. Every method is collective over all ranks."""

    def __init__(self, policy: Policy, *, control: FleetControl | None, engine: RolloutEngine | None) -> None:
        """
        Args:
            control: on global rank 0.
            engine: on replica leaders.
        """
        self._memory = policy.memory
        self._control = control
        self._engine = engine

    def to_trainer(self) -> None:
        """Requests in flight end with the tokens they have, the servers let go of their memory, and the whole
        policy comes back."""
        if not self._memory.parts_away:
            return
        if self._engine is not None:
            self._engine.interrupt()
        dist.barrier()
        if self._control is not None:
            self._control.release_memory()
        dist.barrier()
        self._memory.onload()

    def to_servers(self) -> None:
        """At the end: servers that outlive the run have their memory again, though not the weights."""
        self._memory.offload()
        dist.barrier()
        if self._control is not None:
            self._control.resume_memory()

    def before_push(self) -> None:
        """Only the weights stay, or come back."""
        self._memory.offload(*(part for part in MemoryPart if part is not MemoryPart.weights))
        self._memory.onload(MemoryPart.weights)
        dist.barrier()  # the servers need what every rank has let go of

    def after_push(self) -> None:
        """Nothing stays; the servers have all they need to generate."""
        self._memory.offload()
        dist.barrier()
        if self._control is not None:
            self._control.resume_cache()
