"""From a replica's sequences to the packed global batches of a step, agreed on by all replicas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist

from megatron_drpo.config import Config
from megatron_drpo.losses.aggregation import compute_token_weights, count_loss
from megatron_drpo.packing import pack_global_batch, plan_micro_batches
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.policy.policy import Policy
from megatron_drpo.types import MicroBatch, TrainSequence


def iter_global_batches(
    config: Config, policy: Policy, sequences: list[TrainSequence]
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each update on this rank. Collective over all ranks.

    Args:
        sequences: the replica's share of the step, on its leader; ignored elsewhere.
    """
    num_updates = config.train.num_updates_per_step
    for update in range(num_updates):
        share = len(sequences) // num_updates
        part = sequences[update * share : (update + 1) * share]
        parallel = policy.parallel
        packed = _pack_share(config, policy, part) if parallel.is_leader else None
        yield cast(list[MicroBatch], parallel.broadcast_from_leader(packed))


def _pack_share(config: Config, policy: Policy, sequences: list[TrainSequence]) -> list[MicroBatch]:
    max_tokens = config.policy.max_tokens_per_micro_batch
    num_tokens, num_sequences = count_loss(sequences)
    num_micro_batches = len(plan_micro_batches([len(sequence) for sequence in sequences], max_tokens))
    num_tokens, num_sequences, num_micro_batches = _agree(
        policy.parallel, num_tokens, num_sequences, num_micro_batches
    )
    token_weights = compute_token_weights(
        sequences,
        config.algorithm.aggregation,
        num_loss_tokens=num_tokens,
        num_sequences=num_sequences,
        horizon_tokens=config.algorithm.horizon_tokens or config.rollout.max_response_tokens,
    )
    return pack_global_batch(
        sequences,
        token_weights,
        max_tokens=max_tokens,
        pad_to_multiple=policy.parallel.tensor_size,
        num_micro_batches=policy.round_up_micro_batches(num_micro_batches),
    )


def _agree(
    parallel: ParallelState, num_tokens: int, num_sequences: int, num_micro_batches: int
) -> tuple[int, int, int]:
    """Counts summed, and the number of micro-batches maximised, over the replicas' leaders."""
    counts = torch.tensor([num_tokens, num_sequences, num_micro_batches], device=parallel.device)
    gathered = [torch.empty_like(counts) for _ in range(parallel.data_size)]
    dist.all_gather(gathered, counts, group=parallel.data_group)
    tokens, counted_sequences, micro_batches = zip(*(row.tolist() for row in gathered), strict=True)
    return sum(tokens), sum(counted_sequences), max(micro_batches)
