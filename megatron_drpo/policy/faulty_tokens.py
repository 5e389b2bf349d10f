"""Leaving faulty tokens out of an update, as if their `loss_mask` had been False from the start.

What a token's probability is under the policy is known when its loss is, and the weights of all tokens are
older: they count every loss token of the global batch. So an update that meets faulty tokens, which happens
only when an engine is broken, is computed once more without them.

    T  packed tokens of one micro-batch, this rank's under context parallelism
    S  packed sequences of one micro-batch      F  faulty rows of one
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_drpo.config.schema import Config
from megatron_drpo.losses.aggregation import resolve_horizon, weigh_tokens
from megatron_drpo.metrics.faulty_tokens import FaultyToken
from megatron_drpo.policy.forward import FaultyRows, MicroBatchResult
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.types import MicroBatch


def leave_out_faulty(
    config: Config,
    parallel: ParallelState,
    micro_batches: Sequence[MicroBatch],
    results: Sequence[MicroBatchResult],
) -> tuple[list[MicroBatch], list[FaultyToken]]:
    """The update's micro-batches with masks and weights that leave its faulty tokens out.

    Collective over all ranks.

    Args:
        micro_batches: this rank's share of the global batch.
        results: of these on the last stage; empty elsewhere, where nothing reads masks and weights, so that
            the micro-batches stay as they are.

    Returns:
        The micro-batches, and the faulty tokens of all ranks, the same and in the same order on each.
    """
    found_rows = [result.checked.faulty() for result in results]
    masks = [
        micro_batch.loss_mask_T.index_fill(0, rows.rows_F, False)
        for micro_batch, rows in zip(micro_batches, found_rows, strict=False)
    ]
    masked = [replace(m, loss_mask_T=mask_T) for m, mask_T in zip(micro_batches, masks, strict=False)]
    lengths = [_count_per_sequence(micro_batch, parallel) for micro_batch in masked]
    num_tokens = sum(int(mask_T.sum()) for mask_T in masks)
    num_sequences = sum(int((tokens_S > 0).sum()) for tokens_S in lengths)
    faulty = [
        token
        for micro_batch, rows in zip(micro_batches, found_rows, strict=False)
        for token in _name(micro_batch, rows, parallel)
    ]
    nothing: tuple[int, int, list[FaultyToken]] = (0, 0, [])
    mine = (num_tokens, num_sequences if parallel.context_rank == 0 else 0, faulty)
    gathered = [nothing] * parallel.world_size
    dist.all_gather_object(
        gathered, mine if parallel.tensor_rank == 0 else nothing
    )  # the others have the same
    token_counts, sequence_counts, found = zip(*gathered, strict=True)
    weighed = [
        replace(
            micro_batch,
            token_weights_T=weigh_tokens(
                micro_batch.loss_mask_T,
                tokens_S[micro_batch.sequence_index_T],
                config.algorithm.aggregation,
                num_loss_tokens=sum(token_counts),
                num_sequences=sum(sequence_counts),
                horizon_tokens=resolve_horizon(config),
            ),
        )
        for micro_batch, tokens_S in zip(masked, lengths, strict=True)
    ]
    return weighed or list(micro_batches), sorted(itertools.chain.from_iterable(found))


def _count_per_sequence(micro_batch: MicroBatch, parallel: ParallelState) -> torch.Tensor:
    """int64 [S]: loss tokens of each packed sequence, over the ranks that share it."""
    counts_S = torch.zeros(len(micro_batch.cu_seqlens) - 1, dtype=torch.int64)
    counts_S.index_add_(0, micro_batch.sequence_index_T, micro_batch.loss_mask_T.long())
    return torch.stack(parallel.gather_over_context(counts_S.to(parallel.device))).sum(0).cpu()


def _name(micro_batch: MicroBatch, faulty: FaultyRows, parallel: ParallelState) -> list[FaultyToken]:
    """The faulty rows by sequence and position."""
    return [
        FaultyToken(
            replica=parallel.data_rank,
            sequence_id=micro_batch.sequence_ids[sequence],
            position=position - (micro_batch.prompt_lengths[sequence] - 1),  # of the token predicted there
            logprob=logprob,
            rollout_logprob=rollout_logprob,
        )
        for sequence, position, logprob, rollout_logprob in zip(
            micro_batch.sequence_index_T[faulty.rows_F].tolist(),
            micro_batch.position_ids_T[faulty.rows_F].tolist(),
            faulty.logprobs_F.tolist(),
            faulty.rollout_logprobs_F.tolist(),
            strict=True,
        )
    ]
