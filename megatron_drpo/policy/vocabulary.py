"""This rank's shard of the LM head: its matrix products, and what ranks tell each other about their columns.

    C  rows of a chunk        H  hidden size        K  given ids per token        R  tensor-parallel ranks
    V  rows of this rank's shard of the matrix, or its ids (padding left out) where logits are meant
    N  tokens        S  statistics per token, `RowKernels.statistics`

16-bit weights: products are accumulated and returned in fp32. On CUDA from torch 2.8 on they run on 16-bit
operands (gradients of the logits are rounded for them); elsewhere operands are cast up, the weight in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK_ROWS = 16384
"""Rows of the weight per matrix product on CPUs. For a chunk of few rows BLAS may add up products one by
one; 151936 of them in fp32 lose two digits, ten sums of 16384 do not."""
_CAST_BYTES = 32 * 2**20
"""Of a 16-bit weight's block, cast up."""
_MM_HAS_OUT_DTYPE = hasattr(torch.ops.aten.addmm, "dtype_out")
"""torch.mm(..., out_dtype=) on CUDA, from 2.8 on: https://github.com/pytorch/pytorch/pull/150812"""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of logits and sums: fp32, or float64 for float64."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def operand_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with this weight, or for its gradient, run on."""
    if weight.is_cuda and weight.dtype.itemsize == 2 and _MM_HAS_OUT_DTYPE:
        return weight.dtype
    return accumulation_dtype(weight.dtype)


def add_product_(sum_MN: Tensor, left_MK: Tensor, right_KN: Tensor, *, beta: int = 1) -> None:
    """sum = beta * sum + left @ right, by one matrix product that reads and writes the sum's memory."""
    if left_MK.dtype is sum_MN.dtype:
        torch.addmm(sum_MN, left_MK, right_KN, beta=beta, out=sum_MN)
    else:
        torch.addmm(sum_MN, left_MK, right_KN, beta=beta, out_dtype=sum_MN.dtype, out=sum_MN)


class Combined(NamedTuple):
    """Over the whole vocabulary, bitwise equal on all ranks. No gradient."""

    logsumexp_N: Float[Tensor, " N"]
    """Of the logits divided by the temperature."""
    entropy_N: Float[Tensor, " N"]
    logprobs_N: Float[Tensor, " N"]
    max_logprobs_N: Float[Tensor, " N"]
    argmax_N: Int[Tensor, " N"]
    topk_logprobs_NK: Float[Tensor, "N K"]


class VocabularyShard:
    """Rows rank * V to (rank + 1) * V of the padded [vocabulary, H] matrix."""

    def __init__(self, weight_VH: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.world_size = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        self.num_rows = weight_VH.shape[0]
        self.first_id = rank * self.num_rows
        self.num_ids = min(max(vocab_size - self.first_id, 0), self.num_rows)
        """Rows that are tokens; the rest are padding and take no part."""
        self.dtype = accumulation_dtype(weight_VH.dtype)
        self.operand_dtype = operand_dtype(weight_VH)
        self._ids_VH = weight_VH.detach()[: self.num_ids]

    def write_logits(self, logits_CV: Tensor, hidden_CH: Tensor) -> None:
        """hidden weight^T."""
        hidden_CH = hidden_CH.to(self.operand_dtype)
        for ids, weight_BH in self._blocks():
            add_product_(logits_CV[:, ids], hidden_CH, weight_BH.t(), beta=0)

    def grad_hidden(self, grad_logits_CV: Tensor) -> Tensor:
        """grad_logits weight: this shard's contribution, [C, H] in the accumulation dtype."""
        hidden_size = self._ids_VH.shape[1]
        grad_CH = grad_logits_CV.new_zeros(len(grad_logits_CV), hidden_size, dtype=self.dtype)
        partial_CH = torch.empty_like(grad_CH)
        for ids, weight_BH in self._blocks():
            add_product_(partial_CH, grad_logits_CV[:, ids], weight_BH, beta=0)
            grad_CH += partial_CH
        return grad_CH

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(ids, their rows as operands)."""
        rows = max(1, self.num_ids) if self._ids_VH.is_cuda else _BLOCK_ROWS
        if self._ids_VH.dtype is not self.operand_dtype:
            rows = min(rows, max(1, _CAST_BYTES // (self.operand_dtype.itemsize * self._ids_VH.shape[1])))
        for start in range(0, self.num_ids, rows):
            ids = slice(start, min(start + rows, self.num_ids))
            yield ids, self._ids_VH[ids].to(self.operand_dtype)

    def all_gather(self, statistics_CS: Tensor) -> Tensor:
        """[R, C, S] in rank order. The only collective of the logprob op; none without rows."""
        if self.world_size == 1 or statistics_CS.numel() == 0:
            return statistics_CS[None].expand(self.world_size, -1, -1)
        gathered = statistics_CS.new_empty(self.world_size, *statistics_CS.shape)
        dist.all_gather(list(gathered.unbind(0)), statistics_CS, group=self.group)
        return gathered


def combine(statistics_RNS: Float[Tensor, "R N S"]) -> Combined:
    """From the ranks' `RowKernels.statistics`, in rank order: the same sums in the same order everywhere.

    With q_r the probability of rank r's columns, the chain rule of entropy gives
    H = -sum_r q_r log q_r + sum_r q_r H_r.
    """
    logsumexp_RN, entropy_RN, label_RN, max_RN, argmax_RN = statistics_RNS.unbind(2)[:5]
    logsumexp_N = logsumexp_RN.logsumexp(0)
    share_RN = (logsumexp_RN - logsumexp_N).exp()
    max_N, rank_N = max_RN.max(0)  # the first of equals: the lowest id
    return Combined(
        logsumexp_N=logsumexp_N,
        entropy_N=(torch.special.entr(share_RN) + share_RN * entropy_RN).sum(0),
        logprobs_N=label_RN.amax(0) - logsumexp_N,
        max_logprobs_N=max_N - logsumexp_N,
        argmax_N=argmax_RN.gather(0, rank_N[None])[0].long(),
        topk_logprobs_NK=statistics_RNS[..., 5:].amax(0) - logsumexp_N[:, None],
    )
