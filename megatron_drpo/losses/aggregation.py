"""From per-token losses to one number: the weight of each token in the loss of a global batch.

The loss is sum_t token_weights_t * loss_t over all tokens of the global batch on all data-parallel ranks.
The weights carry the whole normalisation, so the sum may be split over micro-batches, ranks and
sequences in any way.

    R  sampled response tokens of a sequence (" _" in annotations: each sequence has its own)
    N  response tokens of any sequences
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_drpo.config.schema import Aggregation, Config
from megatron_drpo.types import TrainSequence


def count_loss(sequences: Sequence[TrainSequence]) -> tuple[int, int]:
    """(loss tokens, sequences with at least one loss token): summed over the data-parallel ranks, these are
    the two counts that `compute_token_weights` takes."""
    if not sequences:
        return 0, 0
    counts_S = _count_each([sequence.loss_mask for sequence in sequences])
    return int(counts_S.sum()), int((counts_S > 0).sum())


def _count_each(masks: Sequence[Bool[Tensor, " _"]]) -> Int[Tensor, " S"]:
    """True entries of each mask, not one call per mask: a step has thousands of short sequences."""
    ends_S = torch.tensor([len(mask_R) for mask_R in masks]).cumsum(0)
    running_S = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(list(masks)).cumsum(0)])[ends_S]
    return running_S.diff(prepend=torch.zeros(1, dtype=torch.int64))


def compute_token_weights(
    sequences: Sequence[TrainSequence],
    aggregation: Aggregation,
    *,
    num_loss_tokens: int,
    num_sequences: int,
    horizon_tokens: int,
) -> list[Float[Tensor, " _"]]:
    """The weight of each response token in the loss of its global batch.

    With m_it the loss mask of token t of sequence i, n_i = sum_t m_it, and both counts global:

        token_mean                 sum_it m_it loss_it / num_loss_tokens
        sequence_mean_token_mean   1 / num_sequences * sum_i (1 / n_i) sum_t m_it loss_it
        sequence_mean_token_sum    1 / num_sequences * sum_i (1 / horizon_tokens) sum_t m_it loss_it

    The last is DRPO's (arXiv 2606.09821, horizon 8192). A sequence whose tokens are all masked contributes
    zero and is not counted in num_sequences. With no loss token at all, every weight is 0.

    Args:
        sequences: this rank's share of the global batch, or any part of it.
        num_loss_tokens: over the whole global batch on all data-parallel ranks, see `count_loss`.
        num_sequences: likewise; sequences with at least one loss token.
        horizon_tokens: divisor of sequence_mean_token_sum.

    Returns:
        float32 [R] per sequence; 0 where loss_mask is False.
    """
    if not sequences:
        return []
    masks = [sequence.loss_mask for sequence in sequences]
    lengths = [len(mask_R) for mask_R in masks]
    weights_N = weigh_tokens(  # one call for thousands of short sequences
        torch.cat(masks),
        _count_each(masks).repeat_interleave(torch.tensor(lengths)),
        aggregation,
        num_loss_tokens=num_loss_tokens,
        num_sequences=num_sequences,
        horizon_tokens=horizon_tokens,
    )
    return list(weights_N.split(lengths))


def weigh_tokens(
    mask_N: Bool[Tensor, " N"],
    sequence_tokens_N: Int[Tensor, " N"],
    aggregation: Aggregation,
    *,
    num_loss_tokens: int,
    num_sequences: int,
    horizon_tokens: int,
) -> Float[Tensor, " N"]:
    """`compute_token_weights` for any tokens, in any order.

    Args:
        mask_N: whether a token has a loss.
        sequence_tokens_N: loss tokens of each token's whole sequence.

    Returns:
        float32; 0 where the mask is False.
    """
    match aggregation:
        case Aggregation.token_mean:
            divisor_N = torch.tensor(num_loss_tokens)
        case Aggregation.sequence_mean_token_mean:
            divisor_N = num_sequences * sequence_tokens_N
        case Aggregation.sequence_mean_token_sum:
            divisor_N = torch.tensor(num_sequences * horizon_tokens)
    # The divisor is 0 only where the mask is empty; float64 so that the division rounds once.
    return (mask_N.to(torch.float64) / divisor_N.clamp(min=1)).to(torch.float32)


def resolve_horizon(config: Config) -> int:
    """The divisor of sequence_mean_token_sum."""
    return config.algorithm.horizon_tokens or config.rollout.max_response_tokens
