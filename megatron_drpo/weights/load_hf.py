"""HF safetensors -> the local parameters of a sharded Megatron model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_drpo.errors import ModelError
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.mapping import ParameterMapping
from megatron_drpo.weights.sharded import LocalShard, check_all_sharded, iter_local_shards
from megatron_drpo.weights.tied_head import check_tied_head


@torch.no_grad()
def load_hf_weights(chunks: Sequence[GPTModel], folder: HfFolder, mapping: ParameterMapping) -> None:
    """Fill the model from an HF folder; collective over all ranks.

    Each rank reads only the rows and columns it holds. Values are cast to each parameter's own dtype (an
    fp32 router may come from a bf16 folder). Padding rows of the vocabulary become zero. Optimizers copy
    parameters when they are built: load first.

    Args:
        chunks: this rank's bare models, one per virtual pipeline stage.
        folder: the weights.
        mapping: of the folder's family and architecture.

    Raises:
        ModelError: a tensor is missing, unexpected, unused or has another shape; a parameter is not covered;
            a tied output matrix is not the embedding.
    """
    mapping.check_hf({name: folder.shape(name) for name in folder}, str(folder.path))
    check_tied_head(folder)
    used: set[str] = set()
    shards = list(iter_local_shards(chunks))
    for shard in shards:
        used |= _fill(shard, folder, mapping)
    check_all_sharded(chunks, shards)
    _check_all_used(used, next(chunks[0].parameters()).device, folder, mapping)


def _fill(shard: LocalShard, folder: HfFolder, mapping: ParameterMapping) -> set[str]:
    """Read one shard; the names of the HF tensors it came from."""
    tensor_map = mapping[shard.name]
    tensor_map.check_shape(shard.matrix_shape)
    if tensor_map.padded:
        shard.rows(shard.row, shard.num_rows).zero_()
    names: set[str] = set()
    for block in tensor_map.blocks(shard.row, shard.row + shard.num_rows):
        rows = slice(block.hf_row, block.hf_row + block.num_rows)
        values = folder.get_slice(block.hf_name, rows, *shard.columns)
        shard.rows(block.row, block.num_rows).copy_(values)
        names.add(block.hf_name)
    return names


def _check_all_used(
    used: set[str], device: torch.device, folder: HfFolder, mapping: ParameterMapping
) -> None:
    """Raise on all ranks if no rank used some tensor: the model lacks layers or experts of the folder."""
    names = list(mapping.hf_shapes)
    flags = torch.tensor([name in used for name in names], dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    unused = [name for name, flag in zip(names, flags.tolist(), strict=True) if not flag]
    if unused:
        raise ModelError(
            f"{folder.path}: {len(unused)} tensors belong to no parameter of the model, first {unused[0]!r}"
        )
