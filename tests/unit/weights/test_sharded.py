"""Shards of a `sharded_state_dict` as rectangles of global matrices.

Megatron is imported by the rank alone: that takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_drpo.weights.mapping import MegatronName

FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
PROJ = "decoder.layers.self_attention.linear_proj.weight"
NORM = "decoder.layers.1.self_attention.q_layernorm.weight"


def describe_shards() -> list[tuple[Any, ...]]:
    """A chunk on tensor rank 1 of 2: layer 3 of 4 with expert 5 of 8, a row-parallel matrix and a vector.

    It is described with Megatron's own builders, as SequentialMLP, RowParallelLinear and norms use them.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    from megatron_drpo.weights.sharded import iter_local_shards

    layer_and_expert = ((0, 3, 4), (1, 5, 8))
    buffer = torch.arange(100.0)
    fc1 = torch.nn.Parameter(buffer[10:34].view(8, 3))  # gate rows 4..7 and up rows 4..7 of [16, 3]
    sharded_fc1 = ShardedTensor.from_rank_offsets(FC1, fc1, *layer_and_expert, (2, 1, 2), prepend_axis_num=2)
    proj = torch.nn.Parameter(buffer[40:52].view(4, 3))  # columns 3..5 of [4, 6]
    norm = torch.nn.Parameter(buffer[60:64])

    class Chunk:
        def sharded_state_dict(self) -> dict[str, Any]:
            return {
                "fc1": apply_swiglu_sharded_factory(sharded_fc1, layer_and_expert),
                "proj": ShardedTensor.from_rank_offsets(PROJ, proj, (0, 3, 4), (2, 1, 2), prepend_axis_num=1),
                "norm": ShardedTensor.from_rank_offsets(NORM, norm, replica_id=(0, 1, 0)),
                "extra": ShardedObject("_extra_state", None, (1,), (0,)),
            }

    shards = list(iter_local_shards([Chunk()]))  # type: ignore[list-item]
    found = [(s.name, s.matrix_shape, s.row, s.num_rows, s.columns, s.is_main) for s in shards]
    fc1.data = fc1.data + 1000  # as a distributed optimizer that moves the data
    return [(*description, s.rows(s.row + 1, 2)) for description, s in zip(found, shards, strict=True)]


@pytest.mark.distributed
def test_rectangles_and_their_data(run_distributed: Callable[..., list[Any]]) -> None:
    (shards,) = run_distributed(describe_shards, 1)
    gate, up, proj, norm = shards
    experts, columns = MegatronName(FC1, 3, 5), (slice(0, 3),)
    assert gate[:-1] == (experts, (16, 3), 4, 4, columns, True)
    assert up[:-1] == (experts, (16, 3), 12, 4, columns, True)
    assert proj[:-1] == (MegatronName(PROJ, 3), (4, 6), 0, 4, (slice(3, 6),), True)
    name = MegatronName("decoder.layers.self_attention.q_layernorm.weight", 1)
    assert norm[:-1] == (name, (4,), 0, 4, (), False)
    assert torch.equal(gate[-1], torch.arange(1013.0, 1019.0).view(2, 3))  # parameter rows 1 and 2
    assert torch.equal(up[-1], torch.arange(1025.0, 1031.0).view(2, 3))  # parameter rows 5 and 6
    assert torch.equal(proj[-1], torch.arange(43.0, 49.0).view(2, 3))
    assert torch.equal(norm[-1], torch.tensor([61.0, 62.0]))
