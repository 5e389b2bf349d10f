"""Full gradients under HF names, from Megatron's sharded gradient buffers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_drpo.policy.policy import Policy


def gather_gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """HF name -> fp32 gradient of the last `policy.forward_backward`, on global rank 0; empty elsewhere.

    Collective. With the distributed optimizer each replica holds the reduced gradient of its part of every
    bucket alone (megatron/core/distributed/param_and_grad_buffer.py, `start_grad_sync`); the other replicas'
    parts are put back into the buffers first, so that each parameter's `main_grad` is whole.
    """
    for chunk in policy.chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            _gather_buckets(group)
    return {name: tensor.clone() for name, tensor in policy.exporter.tensors(_main_grad, dtype=torch.float32)}


def _gather_buckets(group: Any) -> None:
    ranks = group.intra_distributed_optimizer_instance_group
    rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)
    for bucket in group.buckets:
        shard = bucket.grad_data.view(size, -1)[rank].clone()
        dist.all_gather_into_tensor(bucket.grad_data, shard, group=ranks)


def _main_grad(parameter: Any) -> torch.Tensor:
    return parameter.main_grad
