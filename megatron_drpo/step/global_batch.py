"""From a replica's sequences to the packed global batches of a step, agreed on by all replicas."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist

from megatron_drpo.batching.context_parallel import split_context_parallel
from megatron_drpo.batching.packing import pack_global_batch, plan_micro_batches
from megatron_drpo.config.schema import Config
from megatron_drpo.losses.aggregation import compute_token_weights, count_loss, resolve_horizon
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.policy.policy import Policy
from megatron_drpo.types import MicroBatch, TrainSequence


def iter_global_batches(
    config: Config, policy: Policy, sequences: list[TrainSequence]
) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each update on this rank, its tokens only under context parallelism.

    Collective over all ranks.

    Args:
        sequences: the replica's share of the step, on its leader; ignored elsewhere.
    """
    parallel = policy.parallel
    shares = _split(sequences, config.train.num_updates_per_step)
    counts = _agree(config, parallel, shares) if parallel.is_leader else []
    for update, share in enumerate(shares):
        packed = _pack_share(config, policy, share, counts[update]) if parallel.is_leader else None
        whole = cast(list[MicroBatch], parallel.broadcast_from_leader(packed))
        yield [split_context_parallel(m, parallel.context_rank, parallel.context_size) for m in whole]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of one global batch, over all replicas."""

    loss_tokens: int
    sequences: int
    micro_batches: int
    """The largest number that a replica needs."""


def _split(sequences: list[TrainSequence], num_updates: int) -> list[list[TrainSequence]]:
    """Consecutive parts whose sizes differ by at most one, the first one not the smaller. Where there are
    fewer sequences than updates, some updates have none."""
    bounds = [-(-len(sequences) * update // num_updates) for update in range(num_updates + 1)]
    return [sequences[start:stop] for start, stop in itertools.pairwise(bounds)]


def _agree(config: Config, parallel: ParallelState, shares: list[list[TrainSequence]]) -> list[_Counts]:
    """The counts of every update of the step, in one exchange between the replicas' leaders."""
    max_tokens = config.policy.max_tokens_per_micro_batch
    plans = [
        plan_micro_batches([len(sequence) for sequence in share], max_tokens, parallel.pad_sequences_to)
        for share in shares
    ]
    local = torch.tensor(
        [[*count_loss(share), len(plan)] for share, plan in zip(shares, plans, strict=True)],
        device=parallel.device,
    )
    gathered = [torch.empty_like(local) for _ in range(parallel.data_size)]
    dist.all_gather(gathered, local, group=parallel.data_group)
    replicas = torch.stack(gathered)
    totals, largest = replicas.sum(0).tolist(), replicas.amax(0).tolist()
    return [_Counts(total[0], total[1], most[2]) for total, most in zip(totals, largest, strict=True)]


def _pack_share(
    config: Config, policy: Policy, sequences: list[TrainSequence], counts: _Counts
) -> list[MicroBatch]:
    token_weights = compute_token_weights(
        sequences,
        config.algorithm.aggregation,
        num_loss_tokens=counts.loss_tokens,
        num_sequences=counts.sequences,
        horizon_tokens=resolve_horizon(config),
    )
    return pack_global_batch(
        sequences,
        token_weights,
        max_tokens=config.policy.max_tokens_per_micro_batch,
        pad_to_multiple=policy.pad_to_multiple,
        pad_sequences_to=policy.parallel.pad_sequences_to,
        num_topk=policy.objective.loss.num_topk,
        # The schedule needs one, also where no replica has a sequence.
        num_micro_batches=policy.round_up_micro_batches(max(counts.micro_batches, 1)),
    )
