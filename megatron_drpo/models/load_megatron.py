"""A torch_dist checkpoint -> the local parameters of a sharded Megatron model, whatever layout either has.

The model's own sharded state says which rectangles of which matrices a rank holds (`LocalShard`); where a
matrix lies is read off the checkpoint. So that may have been saved under another parallel layout, with other
padding of the vocabulary, and with or without the layer's number in its keys:

    decoder.layers.mlp.router.weight    [layers, experts, H]    all layers alike
    decoder.layers.3.mlp.router.weight  [experts, H]            Megatron's `moe_layer_freq` is a list
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_drpo.errors import CheckpointError
from megatron_drpo.models.mapping import LAYER_PREFIX, MegatronName, ParameterMapping, TensorMap
from megatron_drpo.models.sharded import LocalShard, check_all_sharded, iter_local_shards
from megatron_drpo.torch_dist import METADATA_FILE, find_checkpoint

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

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_LAYER_KEY = re.compile(re.escape(LAYER_PREFIX) + r"\d+\.")
_NUM_SHOWN = 10


class _Checkpoint(NamedTuple):
    """An opened checkpoint."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    """Of its tensors, by key."""
    has_layer_keys: bool

    def locate(self, name: MegatronName) -> tuple[str, tuple[int, ...]]:
        """Where a matrix lies: in which tensor, and at which indices of the dimensions before its own."""
        expert = () if name.expert is None else (name.expert,)
        if name.layer is None:
            return name.key, expert
        if self.has_layer_keys:
            return f"{LAYER_PREFIX}{name.layer}.{name.key.removeprefix(LAYER_PREFIX)}", expert
        return name.key, (name.layer, *expert)


def load_megatron_weights(chunks: Sequence[GPTModel], path: str | Path, mapping: ParameterMapping) -> None:
    """Fill the model from a checkpoint; collective over all ranks.

    Each rank reads what overlaps with its parameters, into these. Values are cast to each parameter's own
    dtype. Padding rows of the vocabulary become zero. Optimizer and RNG states and Transformer Engine's
    `_extra_state` are left alone. Optimizers copy parameters when they are built: load first.

    Like all loading of such checkpoints this unpickles: only for those from a source that is trusted.

    Args:
        chunks: this rank's bare models, one per virtual pipeline stage.
        path: the checkpoint, or a folder above it (see `find_checkpoint`).
        mapping: of the model's family and architecture.

    Raises:
        CheckpointError: on all ranks: there is no checkpoint, it is damaged, or it is not one of this model.
    """
    checkpoint, problem = _Checkpoint(Path(path), {}, False), None
    try:
        checkpoint = _open_checkpoint(path, mapping)
    except CheckpointError as error:
        problem = str(error)
    _raise_on_all_ranks(problem)
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
    try:
        metadata = FileSystemReader(folder).read_metadata()
    except (*READ_ERRORS, AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / METADATA_FILE} cannot be read: {error}") from error
    shapes = {
        key: tuple(entry.size)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint = _Checkpoint(folder, shapes, any(_LAYER_KEY.match(key) for key in shapes))
    problems = _compare(checkpoint, mapping)
    if problems:
        shown = problems[:_NUM_SHOWN]
        if len(problems) > _NUM_SHOWN:
            shown.append(f"and {len(problems) - _NUM_SHOWN} more")
        raise CheckpointError(f"{folder} is not a checkpoint of this model: " + "; ".join(shown))
    return checkpoint


def _compare(checkpoint: _Checkpoint, mapping: ParameterMapping) -> list[str]:
    """How a checkpoint differs from the model, as sentences."""
    num_layers = 1 + max((m.name.layer for m in mapping if m.name.layer is not None), default=-1)
    num_experts = 1 + max((m.name.expert for m in mapping if m.name.expert is not None), default=-1)
    expected: dict[str, tuple[TensorMap, tuple[int, ...]]] = {}
    for tensor_map in mapping:
        key, indices = checkpoint.locate(tensor_map.name)
        sizes = (num_layers,) if tensor_map.name.expert is None else (num_layers, num_experts)
        expected[key] = tensor_map, sizes[len(sizes) - len(indices) :]
    missing: list[str] = []
    differing: list[str] = []
    for key, (tensor_map, leading) in expected.items():
        found = checkpoint.shapes.get(key)
        if found is None:
            missing.append(f"tensor {key!r} is missing")
        elif not _fits(found, leading, tensor_map):
            shape = [*leading, *tensor_map.shape]
            differing.append(f"tensor {key!r}: expected shape {shape}, found {list(found)}")
    unexpected = [
        f"unexpected tensor {key!r}"
        for key in checkpoint.shapes
        if key.startswith(_MODEL_PREFIXES) and key not in expected
    ]
    return differing + missing + unexpected


def _fits(found: tuple[int, ...], leading: tuple[int, ...], tensor_map: TensorMap) -> bool:
    expected = (*leading, *tensor_map.shape)
    if tensor_map.padded and len(found) == len(expected):
        return found[0] >= expected[0] and found[1:] == expected[1:]
    return found == expected


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
    key, indices = checkpoint.locate(shard.name)
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
