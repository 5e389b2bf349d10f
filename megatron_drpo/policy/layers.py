"""Our own norm and core attention, where Transformer Engine is not installed.

Megatron's local modules cannot serve here: its torch norm refuses sequence parallelism, and its unfused
attention knows no packed sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_drpo.context_parallel import sequence_order


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm; its weight's gradient is summed over sequence-parallel ranks by Megatron."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  Megatron's mark

    def forward(self, x: Float[torch.Tensor, "*tokens hidden"]) -> Float[torch.Tensor, "*tokens hidden"]:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences (THD) with torch's scaled_dot_product_attention.

    Under context parallelism every rank gathers all keys and values: made to be right, not fast. Its memory
    grows with the whole sequences; on GPUs Transformer Engine's ring attention is used instead.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 and pg_collection else None

    def forward(
        self,
        query_TND: Float[torch.Tensor, "T N D"],
        key_TGD: Float[torch.Tensor, "T G D"],
        value_TGD: Float[torch.Tensor, "T G D"],
        attention_mask: None,
        attn_mask_type: object = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Float[torch.Tensor, "T ND"]:
        """All tokens of this rank: under context parallelism T / C of those that cu_seqlens describes."""
        if packed_seq_params is None:
            raise ValueError("PackedAttention takes packed sequences only: packed_seq_params is missing")
        cu_seqlens = packed_seq_params.cu_seqlens_q
        device = query_TND.device
        if self.context_group is None:
            calls = _whole_calls(cu_seqlens.tolist(), device)
        else:
            size, rank = self.context_group.size(), self.context_group.rank()
            # One exchange for both; its backward adds up all ranks' gradients of a key and value.
            both_TGD = gather_from_sequence_parallel_region(
                torch.cat([key_TGD, value_TGD], dim=1), group=self.context_group
            )
            key_TGD, value_TGD = both_TGD[sequence_order(cu_seqlens, size)].chunk(2, dim=1)
            calls = _context_calls(cu_seqlens.tolist(), rank, size, device)
        repeats = query_TND.shape[1] // key_TGD.shape[1]
        key_TND = key_TGD.repeat_interleave(repeats, dim=1)
        value_TND = value_TGD.repeat_interleave(repeats, dim=1)
        pieces: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        for call in calls:
            q = query_TND[call.query_SL].transpose(1, 2)
            k, v = (x[call.key_SK].transpose(1, 2) for x in (key_TND, value_TND))
            mask = call.mask_SLK
            if mask is None:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            else:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=self.scale)
            pieces.append(out.transpose(1, 2)[call.valid_SL])
            positions.append(call.query_SL[call.valid_SL])
        output_TND = torch.cat(pieces)[torch.cat(positions).argsort()]
        return output_TND.flatten(1)


class _Call(NamedTuple):
    """Queries and keys of one attention call over S sequences, right-padded."""

    query_SL: torch.Tensor
    """Packed position among the queries, int64."""
    key_SK: torch.Tensor
    """Packed position among the keys, int64."""
    valid_SL: torch.Tensor
    """Which queries are no padding."""
    mask_SLK: torch.Tensor | None
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


def _length_buckets(bounds: list[int], device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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


def _spans(starts_S: torch.Tensor, lengths_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, longest] positions from each start on, right-padded with the start, and which are no padding."""
    offsets = torch.arange(int(lengths_S.max()), device=starts_S.device)
    valid_SL = offsets < lengths_S[:, None]
    return torch.where(valid_SL, starts_S[:, None] + offsets, starts_S[:, None]), valid_SL
