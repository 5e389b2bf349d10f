"""The parameters of this rank, as rectangles of Megatron's global matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.models.gpt import GPTModel

from megatron_drpo.errors import ModelError
from megatron_drpo.weights.mapping import MegatronName


@dataclass(frozen=True, slots=True)
class LocalShard:
    """Rows and columns of one global matrix (or rows of a vector) that a local parameter holds.

    Keeps the parameter and not a view of its data: distributed optimizers move the data elsewhere.
    """

    name: MegatronName
    matrix_shape: tuple[int, ...]
    """Of the global matrix, padding included."""
    row: int
    """First row within the global matrix."""
    num_rows: int
    columns: tuple[slice, ...]
    """Columns within the global matrix; empty for a vector."""
    parameter: torch.Tensor
    parameter_row: int
    """First row within the parameter: gate and up are two shards of one parameter."""
    is_main: bool
    """Exactly one rank holds a rectangle as its main copy."""

    def rows(self, row: int, num_rows: int, values: torch.Tensor | None = None) -> torch.Tensor:
        """A view of the local data: these rows of the global matrix, the shard's columns.

        Args:
            values: a tensor of the parameter's shape to look at instead of the parameter.
        """
        start = self.parameter_row + row - self.row
        return (self.parameter if values is None else values).detach()[start : start + num_rows]


def iter_local_shards(chunks: Sequence[GPTModel]) -> Iterator[LocalShard]:
    """All parameters of these model chunks; Transformer Engine's extra state is left out.

    Args:
        chunks: this rank's bare models, one per virtual pipeline stage.
    """
    for chunk in chunks:
        for entry in chunk.sharded_state_dict().values():
            if isinstance(entry, ShardedTensor):
                yield _local_shard(entry, entry.data)
            elif isinstance(entry, ShardedTensorFactory):
                for part in cast(list[ShardedTensor], entry.build()):
                    yield _local_shard(part, entry.data)
            else:
                assert isinstance(entry, ShardedObject), entry


def check_all_sharded(chunks: Sequence[GPTModel], shards: Sequence[LocalShard]) -> None:
    """Raise ModelError if a parameter of these chunks belongs to none of these shards of theirs."""
    sharded = {shard.parameter.data_ptr() for shard in shards}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if parameter.data_ptr() not in sharded:
                raise ModelError(f"Megatron parameter {name!r} is not part of its sharded state: not loaded")


def _local_shard(shard: ShardedTensor, parameter: torch.Tensor | None) -> LocalShard:
    assert shard.data is not None
    assert parameter is not None
    leading = shard.prepend_axis_num
    row, *columns = shard.global_offset[leading:]
    offset = shard.data.storage_offset() - parameter.storage_offset()
    return LocalShard(
        name=MegatronName.from_sharded(shard.key, shard.global_offset[:leading]),
        matrix_shape=shard.global_shape[leading:],
        row=row,
        num_rows=shard.local_shape[0],
        columns=tuple(
            slice(start, start + size) for start, size in zip(columns, shard.local_shape[1:], strict=True)
        ),
        parameter=parameter,
        parameter_row=offset // parameter.stride(0),
        is_main=is_main_replica(shard.replica_id),
    )
