"""The policy's memory, kept on the host while rollout servers have the device.

Megatron holds parameters, gradients and optimizer state in flat buffers, with views of them all over: in the
modules, in the optimizer's shards, in `main_grad`. So what moves is the storage below a view: its bytes go to
the host and it shrinks to nothing; when it has grown again every view sees them at their old place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_drpo.policy.optimizer import distributed_optimizers


class MemoryPart(StrEnum):
    """What can be moved by itself."""

    weights = "weights"
    """The model's parameters and buffers."""
    gradients = "gradients"
    """Zeros when they come back: they mean something within an update only."""
    optimizer = "optimizer"
    """Main parameters and moments."""
    reference = "reference"
    """The frozen model of a KL penalty."""


class PolicyMemory:
    """Moves the parts of one rank's policy to the host and back, bit for bit. Not collective."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        reference_chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
    ) -> None:
        self._tensors: dict[MemoryPart, Callable[[], Iterator[torch.Tensor]]] = {
            MemoryPart.weights: lambda: _weights(chunks),
            MemoryPart.gradients: lambda: _gradients(chunks),
            MemoryPart.optimizer: lambda: _optimizer_state(optimizer),
            MemoryPart.reference: lambda: _module_tensors(reference_chunks),
        }
        self._hosts: dict[torch.UntypedStorage, torch.Tensor] = {}
        """Kept: to pin memory takes longer than to copy."""
        self._away: dict[MemoryPart, list[tuple[torch.UntypedStorage, torch.device, int]]] = {}

    @property
    def parts_away(self) -> frozenset[MemoryPart]:
        return frozenset(self._away)

    def offload(self, *parts: MemoryPart) -> None:
        """Give the device's memory of these parts back; until `onload` they must not be touched. All parts if
        none is named; those that are away already stay so."""
        for part in parts or tuple(MemoryPart):
            if part in self._away:
                continue
            moved = []
            for storage, device in self._storages(part):
                if part is not MemoryPart.gradients:
                    self._host(storage, device).copy_(_bytes(storage, device))
                moved.append((storage, device, storage.nbytes()))
            for storage, _, _ in moved:
                storage.resize_(0)
            self._away[part] = moved
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the servers are other processes

    def onload(self, *parts: MemoryPart) -> None:
        """The inverse."""
        for part in parts or tuple(MemoryPart):
            for storage, device, num_bytes in self._away.pop(part, []):
                storage.resize_(num_bytes)
                if part is MemoryPart.gradients:
                    _bytes(storage, device).zero_()
                else:
                    _bytes(storage, device).copy_(self._hosts[storage])

    def _storages(self, part: MemoryPart) -> list[tuple[torch.UntypedStorage, torch.device]]:
        """Each once, also where an earlier part has it: in fp32 the optimizer's shards are views of the
        weights."""
        order = list(MemoryPart)
        earlier = order[: order.index(part)]
        taken = {storage for other in earlier for storage in _unique(self._tensors[other]())}
        return [(s, device) for s, device in _unique(self._tensors[part]()).items() if s not in taken]

    def _host(self, storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
        host = self._hosts.get(storage)
        if host is None or host.numel() != storage.nbytes():
            pinned = device.type == "cuda"
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
            self._hosts[storage] = host
        return host


def _weights(chunks: Sequence[DistributedDataParallel]) -> Iterator[torch.Tensor]:
    yield from _module_tensors(chunks)
    for buffer in _ddp_buffers(chunks):
        if buffer.param_data is not None:
            yield buffer.param_data


def _gradients(chunks: Sequence[DistributedDataParallel]) -> Iterator[torch.Tensor]:
    for buffer in _ddp_buffers(chunks):
        yield buffer.grad_data


def _optimizer_state(optimizer: MegatronOptimizer) -> Iterator[torch.Tensor]:
    for part in distributed_optimizers(optimizer):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            # Step counters stay: they are read at any time, and often lie on the host.
            yield from (value for value in state.values() if torch.is_tensor(value) and value.dim() > 0)


def _module_tensors(modules: Sequence[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from torch.nn.Module.buffers(module)


def _ddp_buffers(chunks: Sequence[DistributedDataParallel]) -> Iterator[Any]:
    for chunk in chunks:
        yield from [*chunk.buffers, *chunk.expert_parallel_buffers]


def _unique(tensors: Iterable[torch.Tensor]) -> dict[torch.UntypedStorage, torch.device]:
    return {tensor.untyped_storage(): tensor.device for tensor in tensors}


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """uint8, all of the storage."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
