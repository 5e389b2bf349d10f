"""A torch_dist checkpoint -> the local parameters of a sharded Megatron model, whatever layout either has.

The model's own sharded state says which rectangles of which matrices a rank holds (`LocalShard`); where a
matrix lies is read off the checkpoint. So that may have been saved under another parallel layout, with other
padding of the vocabulary, and with or without the layer's number in its keys.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_drpo.errors import CheckpointError
from megatron_drpo.weights.mapping import ParameterMapping, TensorMap
from megatron_drpo.weights.sharded import LocalShard, check_all_sharded, iter_local_shards
from megatron_drpo.weights.torch_dist import METADATA_FILE, find_checkpoint, read_metadata
from megatron_drpo.weights.torch_dist_keys import Places, check_places, find_layout

READ_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    CheckpointingException,
    CheckpointException,
)
"""What Megatron and torch raise of a checkpoint that is damaged or not readable."""


class _Checkpoint(NamedTuple):
    """An opened checkpoint of the right model."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    """Of its tensors, by key."""
    places: Places


def load_megatron_weights(chunks: Sequence[GPTModel], path: str | Path, mapping: ParameterMapping) -> None:
    """Fill the model from a checkpoint; collective over all ranks.

    Each rank reads what overlaps with its parameters, into these. Values are cast to each parameter's own
    dtype. Padding rows of the vocabulary become zero. Optimizer and RNG states and Transformer Engine's
    `_extra_state` are left alone. Optimizers copy parameters when they are built: load first.

    Args:
        chunks: this rank's bare models, one per virtual pipeline stage.
        path: the checkpoint, or a folder above it (see `find_checkpoint`).
        mapping: of the model's family and architecture.

    Raises:
        CheckpointError: on all ranks: there is no checkpoint, it is damaged, or it is not one of this model.
    """
    checkpoint = problem = None
    try:
        checkpoint = _open_checkpoint(path, mapping)
    except CheckpointError as error:
        problem = str(error)
    _raise_on_all_ranks(problem)
    assert checkpoint is not None
    shards = list(iter_local_shards(chunks))
    check_all_sharded(chunks, shards)
    wanted: dict[str, ShardedTensor] = {}
    for shard in shards:
        tensor = _request(shard, mapping[shard.name], checkpoint)
        if tensor is not None:
            wanted[str(len(wanted))] = tensor
    try:
        # Nothing to compare between ranks: rectangles of the model's own sharded state, with checked shapes.
        dist_checkpointing.load(wanted, str(checkpoint.folder), validate_access_integrity=False)
    except READ_ERRORS as error:
        problem = f"{checkpoint.folder} cannot be read: {describe_error(error)}"
    _raise_on_all_ranks(problem)


def check_megatron_weights(path: str | Path, mapping: ParameterMapping) -> None:
    """What `load_megatron_weights` checks before it loads; needs no process group.

    Raises:
        CheckpointError: there is no checkpoint, or not one of this model; names tensors and shapes.
    """
    _open_checkpoint(path, mapping)


def describe_error(error: BaseException) -> str:
    """The message of a failed read or write; of the errors of several ranks, the first one's."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {first}"
    return str(error)


def _open_checkpoint(path: str | Path, mapping: ParameterMapping) -> _Checkpoint:
    """Read the table of tensors and check it against the mapping."""
    folder = find_checkpoint(path)
    metadata = read_metadata(folder / METADATA_FILE)
    shapes = {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    places = Places(mapping, find_layout(shapes))
    check_places(places, shapes, str(folder))
    return _Checkpoint(folder, shapes, places)


def _request(shard: LocalShard, tensor_map: TensorMap, checkpoint: _Checkpoint) -> ShardedTensor | None:
    """The shard, without its padding, as a rectangle of the checkpoint; None if nothing is left of it.

    `axis_fragmentations=None` says that the rectangles of all ranks need not be of one size.
    """
    tensor_map.check_shape(shard.matrix_shape)
    num_rows = shard.num_rows
    if tensor_map.padded:
        shard.rows(shard.row, num_rows).zero_()
        num_rows = min(num_rows, tensor_map.shape[0] - shard.row)
        if num_rows <= 0:
            return None
    key, _, indices = checkpoint.places[shard.name]
    values = shard.rows(shard.row, num_rows)[(None,) * len(indices)]
    return ShardedTensor(
        key=key,
        data=values,
        dtype=values.dtype,
        local_shape=tuple(values.shape),
        global_shape=checkpoint.shapes[key],
        global_offset=(*indices, shard.row, *(columns.start for columns in shard.columns)),
        axis_fragmentations=None,
    )


def _raise_on_all_ranks(problem: str | None) -> None:
    """A problem of any rank ends all of them, so that none waits for the others."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise CheckpointError(found)
