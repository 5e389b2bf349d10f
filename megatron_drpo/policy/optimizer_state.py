"""The optimizer's state for checkpoints: every parameter whole, on one rank, under a global name.

Megatron's distributed optimizer cuts a buffer of many parameters into one range per data-parallel rank, so
that a parameter may lie on several ranks. Its own way to whole parameters (`fully_reshardable` of
megatron/core/optimizer/distrib_optimizer.py) gathers all of them on every rank, or on the first. Here every
parameter has one owner among the ranks that share it, and the pieces travel there in buckets: the owner
saves and loads it, and no rank holds more than an even share and one parameter. What is stored is the
same: whole parameters, so either can read what the other wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

EXCHANGE_NUMEL = 2**24
"""Elements of consecutive parameters that travel together; a larger parameter travels alone."""
_STATES = ("param", "exp_avg", "exp_avg_sq")
_PREFIX = "optimizer.state"

Sharded = ShardedTensor | ShardedTensorFactory


@dataclass(frozen=True, slots=True)
class _Shared:
    """A parameter that the ranks of a data-parallel group share."""

    name: str
    """Within this process only."""
    parameter: torch.nn.Parameter
    counts: list[int]
    """Elements on each rank; consecutive ones, in rank order."""
    owner: int
    """Its rank in the group."""


def save_state(parts: Sequence[DistributedOptimizer], model_state: dict[str, Any]) -> dict[str, Any]:
    """Collective: the state of the parameters that this rank owns, as sharded tensors on the host.

    `model_state` is the sharded state of the bare model, its parameters as data; of these as well, the owner
    is made the one that saves.
    """
    metadata = _sharded_parameters(model_state)
    state: dict[str, Any] = {}
    for number, part in enumerate(parts):
        exchange = _Exchange(part, number)
        for shared in exchange.parameters:
            sharded = metadata[shared.parameter]
            sharded.replica_id = (*_place(sharded), int(shared.owner != exchange.rank))
        # Ranks of other tensor-parallel or pipeline places may hold a copy: one of them saves it.
        saved = [shared for shared in exchange.parameters if _place(metadata[shared.parameter]) == (0, 0)]
        for bucket in _buckets(saved):
            for which in _STATES:
                for shared, values in exchange.gather(bucket, which):
                    sharded = _describe(metadata[shared.parameter], which, values)
                    state[f"{shared.name}.{which}"] = _own_storages(sharded)
    return state


def wanted_state(parts: Sequence[DistributedOptimizer], model_state: dict[str, Any]) -> dict[str, Any]:
    """What this rank has to load for `restore_state`, as sharded tensors without data."""
    metadata = _sharded_parameters(model_state)
    state: dict[str, Any] = {}
    for number, part in enumerate(parts):
        exchange = _Exchange(part, number)
        for shared in exchange.parameters:
            if shared.owner == exchange.rank:
                values = torch.empty(shared.parameter.shape, dtype=torch.float32, device="meta")
                for which in _STATES:
                    sharded = _describe(metadata[shared.parameter], which, values)
                    sharded.replica_id = (*_place(sharded), 0)
                    state[f"{shared.name}.{which}"] = _without_data(sharded)
    return state


def restore_state(
    parts: Sequence[DistributedOptimizer], model_state: dict[str, Any], loaded: dict[str, Any]
) -> None:
    """Collective: the loaded values of `wanted_state`, into the optimizers' tensors. `loaded` is emptied."""
    metadata = _sharded_parameters(model_state)
    for number, part in enumerate(parts):
        exchange = _Exchange(part, number)
        for bucket in _buckets(exchange.parameters):
            for which in _STATES:
                whole = {
                    shared.name: _merge(metadata[shared.parameter], loaded.pop(f"{shared.name}.{which}"))
                    for shared in bucket
                    if shared.owner == exchange.rank
                }
                exchange.scatter(bucket, which, whole)


class _Exchange:
    """Pieces of one optimizer's state, from their holders to the parameters' owners and back."""

    def __init__(self, part: DistributedOptimizer, number: int) -> None:
        self._part = part
        self._group: dist.ProcessGroup = part.data_parallel_group
        self._size = self._group.size()
        self._device: torch.device = part.buffers[0].grad_data.device
        self.rank = self._group.rank()
        parameters: list[torch.nn.Parameter] = []
        counts: list[list[int]] = []
        for buffer in part.buffers:
            for parameter, (start, end, bucket) in buffer.param_index_map.items():
                parameters.append(parameter)
                counts.append(_split(start, end, buffer.buckets[bucket], self._size))
        owners = _choose_owners(counts, self._size)
        self.parameters = [
            _Shared(f"{number}.{index}", parameter, count, owner)
            for index, (parameter, count, owner) in enumerate(zip(parameters, counts, owners, strict=True))
        ]

    def gather(self, bucket: list[_Shared], which: str) -> Iterator[tuple[_Shared, torch.Tensor]]:
        """Collective. One state of every parameter of a bucket that this rank owns, whole, on the host."""
        by_owner = sorted(bucket, key=lambda shared: shared.owner)
        pieces = [self._held(shared, which).reshape(-1) for shared in by_owner if shared.counts[self.rank]]
        sent = torch.cat(pieces) if pieces else self._empty(0)
        received = self._exchange(sent, self._held_per_owner(bucket), self._owned_per_rank(bucket))
        owned = [shared for shared in bucket if shared.owner == self.rank]
        whole = [torch.empty(sum(shared.counts), dtype=torch.float32) for shared in owned]
        for (index, start, stop), piece in zip(self._pieces(owned), self._cut(owned, received), strict=True):
            whole[index][start:stop].copy_(piece)
        for shared, values in zip(owned, whole, strict=True):
            yield shared, values.view(shared.parameter.shape)

    def scatter(self, bucket: list[_Shared], which: str, whole: dict[str, torch.Tensor]) -> None:
        """Collective. The way back: owned parameters, by name, to their holders' tensors."""
        owned = [shared for shared in bucket if shared.owner == self.rank]
        sent = self._empty(sum(self._owned_per_rank(bucket)))
        for (index, start, stop), piece in zip(self._pieces(owned), self._cut(owned, sent), strict=True):
            piece.copy_(whole[owned[index].name].reshape(-1)[start:stop])
        received = self._exchange(sent, self._owned_per_rank(bucket), self._held_per_owner(bucket))
        by_owner = [s for s in sorted(bucket, key=lambda s: s.owner) if s.counts[self.rank]]
        for shared, piece in zip(
            by_owner, received.split([s.counts[self.rank] for s in by_owner]), strict=True
        ):
            held = self._held(shared, which)
            held.copy_(piece.view_as(held))

    def _held(self, shared: _Shared, which: str) -> torch.Tensor:
        """This rank's piece."""
        state: dict[str, torch.Tensor] = self._part._get_main_param_and_optimizer_states(shared.parameter)
        return state[which].detach()

    def _held_per_owner(self, bucket: list[_Shared]) -> list[int]:
        counts = [0] * self._size
        for shared in bucket:
            counts[shared.owner] += shared.counts[self.rank]
        return counts

    def _owned_per_rank(self, bucket: list[_Shared]) -> list[int]:
        owned = [shared.counts for shared in bucket if shared.owner == self.rank]
        return [sum(counts[rank] for counts in owned) for rank in range(self._size)]

    def _pieces(self, owned: list[_Shared]) -> list[tuple[int, int, int]]:
        """As they arrive, rank by rank: (index of the parameter, its first and last + 1 element)."""
        starts = [0] * len(owned)
        pieces = []
        for rank in range(self._size):
            for index, shared in enumerate(owned):
                stop = starts[index] + shared.counts[rank]
                pieces.append((index, starts[index], stop))
                starts[index] = stop
        return pieces

    def _cut(self, owned: list[_Shared], flat: torch.Tensor) -> Sequence[torch.Tensor]:
        return flat.split([stop - start for _, start, stop in self._pieces(owned)]) if owned else ()

    def _exchange(self, sent: torch.Tensor, sent_counts: list[int], counts: list[int]) -> torch.Tensor:
        received = self._empty(sum(counts))
        dist.all_to_all_single(received, sent, counts, sent_counts, group=self._group)
        return received

    def _empty(self, numel: int) -> torch.Tensor:
        return torch.empty(numel, dtype=torch.float32, device=self._device)


def _split(start: int, end: int, bucket: Any, num_ranks: int) -> list[int]:
    """Elements [start, end) of a buffer per rank: each has one range of equal size of every bucket."""
    size = bucket.grad_data.numel() // num_ranks
    bounds = [bucket.offset + rank * size for rank in range(num_ranks + 1)]
    return [max(0, min(end, last) - max(start, first)) for first, last in pairwise(bounds)]


def _choose_owners(counts: list[list[int]], num_ranks: int) -> list[int]:
    """The rank that holds most of a parameter, unless it has its share already: then the one with least.

    No rank gets more than the mean and the largest parameter.
    """
    sizes = [sum(count) for count in counts]
    share = sum(sizes) / num_ranks
    loads = [0] * num_ranks
    owners = []
    for size, count in zip(sizes, counts, strict=True):
        owner = max(range(num_ranks), key=count.__getitem__)
        if loads[owner] + size > share:
            owner = min(range(num_ranks), key=loads.__getitem__)
        loads[owner] += size
        owners.append(owner)
    return owners


def _buckets(parameters: list[_Shared]) -> list[list[_Shared]]:
    buckets: list[list[_Shared]] = []
    room = -1
    for shared in parameters:
        size = sum(shared.counts)
        if size > room:
            buckets.append([])
            room = EXCHANGE_NUMEL
        buckets[-1].append(shared)
        room -= size
    return buckets


def _sharded_parameters(model_state: dict[str, Any]) -> dict[torch.nn.Parameter, Sharded]:
    """How each parameter is a part of a global tensor."""
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {one.data: one for one in nested_values(sharded)}


def _place(sharded: Sharded) -> tuple[int, int]:
    """Which copy among the pipeline's and the tensor-parallel ranks; (0, 0) is the one that counts."""
    pipeline, tensor, _ = cast(tuple[int, int, int], sharded.replica_id)
    return pipeline, tensor


def _describe(sharded: Sharded, which: str, values: torch.Tensor) -> Sharded:
    """The same part of the state's global tensor."""
    fields: dict[str, Any] = {"key": f"{_PREFIX}.{which}.{sharded.key}", "data": values}
    if isinstance(sharded, ShardedTensor):
        fields["dtype"] = values.dtype
    return replace(sharded, **fields)


def _built(sharded: Sharded) -> Any:
    """A factory's parts; a tensor is its own."""
    return sharded.build() if isinstance(sharded, ShardedTensorFactory) else sharded


def _map(function: Any, built: Any) -> Any:
    return dict_list_map_inplace(function, built) if isinstance(built, (dict, list)) else function(built)


def _own_storages(sharded: Sharded) -> Any:
    """A factory's parts are views of the whole: the writer would copy each while the whole is still there."""

    def own(part: ShardedTensor) -> ShardedTensor:
        data = cast(torch.Tensor, part.data)
        if data.untyped_storage().nbytes() != data.nbytes:
            part.data = data.clone()
        return part

    return _map(own, _built(sharded))


def _without_data(sharded: Sharded) -> Any:
    return _map(ShardedTensor.without_data, _built(sharded))


def _merge(sharded: Sharded, loaded: Any) -> torch.Tensor:
    return sharded.merge_fn(loaded) if isinstance(sharded, ShardedTensorFactory) else loaded
