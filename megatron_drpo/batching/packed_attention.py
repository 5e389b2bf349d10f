"""Causal attention over packed sequences (THD) with torch's scaled_dot_product_attention.

T  tokens of this rank      N  query heads      G  key and value heads      D  head size
S  sequences of one call    L  longest of them's queries    K  longest of them's keys
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from megatron_drpo.batching.context_parallel import sequence_order


@dataclass(frozen=True, slots=True)
class ContextRanks:
    """The ranks that share each sequence's tokens, as `context_parallel` cuts them."""

    rank: int
    size: int
    gather: Callable[[Tensor], Tensor]
    """All ranks' tokens in rank order; the backward pass gives each rank the sum of its tokens' gradients."""


def attend_packed(
    query_TND: Float[Tensor, "T N D"],
    key_TGD: Float[Tensor, "T G D"],
    value_TGD: Float[Tensor, "T G D"],
    cu_seqlens: Int[Tensor, " _"],
    scale: float | None,
    context: ContextRanks | None = None,
) -> Float[Tensor, "T ND"]:
    """Each token attends to those before it in its own sequence, and to itself.

    Under context parallelism every rank gathers all keys and values: made to be right, not fast. Its memory
    grows with the whole sequences.

    Args:
        cu_seqlens: [S + 1], of the whole sequences, those of all context-parallel ranks together.
        scale: of the scores; None is 1 / sqrt(D).
    """
    device = query_TND.device
    if context is None:
        calls = _whole_calls(cu_seqlens.tolist(), device)
    else:
        # One exchange for both.
        both_TGD = context.gather(torch.cat([key_TGD, value_TGD], dim=1))
        key_TGD, value_TGD = both_TGD[sequence_order(cu_seqlens, context.size)].chunk(2, dim=1)
        calls = _context_calls(cu_seqlens.tolist(), context.rank, context.size, device)
    repeats = query_TND.shape[1] // key_TGD.shape[1]
    key_TND = key_TGD.repeat_interleave(repeats, dim=1)
    value_TND = value_TGD.repeat_interleave(repeats, dim=1)
    pieces: list[Tensor] = []
    positions: list[Tensor] = []
    for call in calls:
        q = query_TND[call.query_SL].transpose(1, 2)
        k, v = (x[call.key_SK].transpose(1, 2) for x in (key_TND, value_TND))
        mask = call.mask_SLK
        if mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
        pieces.append(out.transpose(1, 2)[call.valid_SL])
        positions.append(call.query_SL[call.valid_SL])
    output_TND = torch.cat(pieces)[torch.cat(positions).argsort()]
    return output_TND.flatten(1)


class _Call(NamedTuple):
    """Queries and keys of one attention call over S sequences, right-padded."""

    query_SL: Tensor
    """Packed position among the queries, int64."""
    key_SK: Tensor
    """Packed position among the keys, int64."""
    valid_SL: Tensor
    """Which queries are no padding."""
    mask_SLK: Tensor | None
    """True: may attend. None: query i attends to keys 0 .. i."""


def _whole_calls(bounds: list[int], device: torch.device) -> Iterator[_Call]:
    """All tokens of every sequence. Under a causal mask padding on the right changes nothing."""
    for starts_S, lengths_S in _length_buckets(bounds, device):
        index_SL, valid_SL = _spans(starts_S, lengths_S)
        yield _Call(index_SL, index_SL, valid_SL, None)


def _context_calls(bounds: list[int], rank: int, size: int, device: torch.device) -> Iterator[_Call]:
    """This rank's two parts of every sequence, each with the keys up to its own end."""
    for starts_S, lengths_S in _length_buckets(bounds, device):
        length_S = lengths_S // (2 * size)  # of one part
        for part, is_back in ((rank, False), (2 * size - 1 - rank, True)):
            query_SL, valid_SL = _spans(starts_S // size + is_back * length_S, length_S)
            key_SK, _ = _spans(starts_S, (part + 1) * length_S)
            position_SL = part * length_S[:, None] + torch.arange(query_SL.shape[1], device=device)
            mask_SLK = torch.arange(key_SK.shape[1], device=device) <= position_SL[..., None]
            yield _Call(query_SL, key_SK, valid_SL, mask_SLK)


def _length_buckets(bounds: list[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Group sequences whose lengths round up to the same power of two: each group is one attention call.

    Yields:
        (starts_S, lengths_S int64): the group's sequences; empty ones are left out.
    """
    buckets: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(bounds):
        if end > start:
            buckets.setdefault((end - start - 1).bit_length(), []).append((start, end - start))
    for spans in buckets.values():
        starts, lengths = zip(*spans, strict=True)
        yield torch.tensor(starts, device=device), torch.tensor(lengths, device=device)


def _spans(starts_S: Tensor, lengths_S: Tensor) -> tuple[Tensor, Tensor]:
    """[S, longest] positions from each start on, right-padded with the start, and which are no padding."""
    offsets = torch.arange(int(lengths_S.max()), device=starts_S.device)
    valid_SL = offsets < lengths_S[:, None]
    return torch.where(valid_SL, starts_S[:, None] + offsets, starts_S[:, None]), valid_SL
