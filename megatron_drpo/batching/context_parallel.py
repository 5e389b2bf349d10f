"""Which tokens of a micro-batch each context-parallel rank holds, and how to put them together again.

Every sequence is cut into 2C equal parts; rank r holds part r and part 2C - 1 - r. Under a causal mask early
parts are cheap and late ones dear, so that the pairs cost the same on every rank. Transformer Engine's ring
attention and Megatron's rotary embedding expect packed sequences in this order.

    C  context-parallel ranks        S  packed sequences of a micro-batch
    T  packed tokens of all ranks together      U  tokens of one rank, T / C
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from megatron_drpo.types import MicroBatch


def local_positions(cu_seqlens: Int[Tensor, " _"], rank: int, size: int) -> Int[Tensor, " U"]:
    """The packed position (int64, ascending within each sequence) of each token that a rank holds.

    Args:
        cu_seqlens: [S + 1], of the whole sequences.

    Raises:
        ValueError: a sequence's length is not a multiple of 2 * size.
    """
    starts_S, lengths_S = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    if (lengths_S % (2 * size)).any():
        raise ValueError(
            f"lengths {lengths_S.tolist()} of packed sequences: each must be a multiple of {2 * size}, "
            f"twice the number of context-parallel ranks"
        )
    sequence_index = torch.arange(len(lengths_S), device=cu_seqlens.device).repeat_interleave(
        lengths_S // size
    )
    part = (lengths_S // (2 * size))[sequence_index]
    offset = torch.arange(len(part), device=cu_seqlens.device) - (starts_S // size)[sequence_index]
    # `offset` runs through the front part from 0, then through the back part from `part`.
    skipped = torch.where(offset < part, rank, 2 * size - 2 - rank) * part
    return starts_S[sequence_index] + skipped + offset


def sequence_order(cu_seqlens: Int[Tensor, " _"], size: int) -> Int[Tensor, " T"]:
    """For each packed position, where its token stands among all ranks' tokens in rank order."""
    positions = torch.cat([local_positions(cu_seqlens, rank, size) for rank in range(size)])
    order_T = torch.empty_like(positions)
    order_T[positions] = torch.arange(len(positions), device=positions.device)
    return order_T


def split_context_parallel(micro_batch: MicroBatch, rank: int, size: int) -> MicroBatch:
    """One rank's tokens of a whole micro-batch; what describes whole sequences stays as it is.

    Raises:
        ValueError: see `local_positions`.
    """
    if size == 1:
        return micro_batch
    positions = local_positions(micro_batch.cu_seqlens, rank, size)
    local: dict[str, Any] = {}
    for field in dataclasses.fields(micro_batch):
        value = getattr(micro_batch, field.name)
        if field.name.endswith(("_T", "_TK", "_TMK")) and value is not None:
            local[field.name] = value[positions]
    return dataclasses.replace(micro_batch, **local)


def merge_context_parallel(
    pieces: Sequence[Shaped[Tensor, "U ..."]], cu_seqlens: Int[Tensor, " _"]
) -> Shaped[Tensor, "T ..."]:
    """Values per token of all ranks, in rank order -> per packed position; the inverse of the split.

    Args:
        cu_seqlens: [S + 1], of the whole sequences, as every rank's micro-batch has it; `packing.unpack` then
            takes the result together with any of them.
    """
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(list(pieces))[sequence_order(cu_seqlens, len(pieces))]
