"""Row kernels in plain torch: for CPUs, and for CUDA without Triton.

A chunk goes through block by block of whole rows, so that the passes over a block find it in the cache and
temporaries take a few megabytes whatever the chunk's size. Notation as in `base.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_drpo.policy.kernels.base import NUM_STATISTICS

_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Logits per block: about a core's L2 cache; on a GPU, enough to fill it."""

_WINDOW = 128
"""Columns per step of the search for the largest logit."""


class TorchRows:
    """`RowKernels` by torch operators; rows do not influence each other."""

    def statistics(
        self,
        logits_CV: Tensor,
        labels_C: Tensor,
        inverse_temperature_C: Tensor,
        topk_ids_CK: Tensor | None,
        *,
        first_id: int,
    ) -> Tensor:
        num_rows, num_ids = logits_CV.shape
        num_given = 0 if topk_ids_CK is None else topk_ids_CK.shape[1]
        result = logits_CV.new_full((num_rows, NUM_STATISTICS + num_given), -torch.inf)
        logsumexp_C, entropy_C, labels_logit_C, max_C, argmax_C = result.unbind(1)[:NUM_STATISTICS]
        if num_ids == 0:
            entropy_C.zero_()
            argmax_C.zero_()
            return result
        scratch = _Scratch(logits_CV)
        for rows in scratch.blocks():
            inverse_RL = inverse_temperature_C[rows, None]
            largest_R, column_R = _largest(logits_CV[rows])
            exponents_RV = torch.sub(logits_CV[rows], largest_R[:, None], out=scratch.first(rows))
            exponents_RV = _without_underflow_(exponents_RV.mul_(inverse_RL))
            exps_RV = torch.exp(exponents_RV, out=scratch.second(rows))
            sum_R = exps_RV.sum(1)
            max_C[rows] = largest_R * inverse_RL[:, 0]
            argmax_C[rows] = (column_R + first_id).to(result.dtype)
            logsumexp_C[rows] = max_C[rows] + sum_R.log()
            # H = -sum p log p with log p = exponent - log sum; both are 0 at the largest logit when it is
            # all there is, so no digits are lost at either end.
            entropy_C[rows] = sum_R.log() - exps_RV.mul_(exponents_RV).sum(1) / sum_R
        labels_logit_C.copy_(_pick(logits_CV, labels_C[:, None], inverse_temperature_C, first_id)[:, 0])
        if topk_ids_CK is not None:
            result[:, NUM_STATISTICS:] = _pick(logits_CV, topk_ids_CK, inverse_temperature_C, first_id)
        return result

    def grad_logits_(
        self,
        logits_CV: Tensor,
        labels_C: Tensor,
        inverse_temperature_C: Tensor,
        logsumexp_C: Tensor,
        entropy_C: Tensor,
        grad_logprobs_C: Tensor,
        grad_entropy_C: Tensor | None,
        *,
        first_id: int,
        dtype: torch.dtype,
    ) -> Tensor:
        num_ids = logits_CV.shape[1]
        # A narrower result takes the front half of each row: its block has been read by then.
        in_place = dtype is logits_CV.dtype
        grad_CV = logits_CV if in_place else logits_CV.view(dtype)[:, :num_ids]
        if num_ids == 0:
            return grad_CV
        scaled_grad_C = grad_logprobs_C * inverse_temperature_C
        scaled_grad_entropy_C = None if grad_entropy_C is None else grad_entropy_C * inverse_temperature_C
        scratch = _Scratch(logits_CV)
        for rows in scratch.blocks():
            logprobs_RV = torch.mul(
                logits_CV[rows], inverse_temperature_C[rows, None], out=scratch.first(rows)
            )
            logprobs_RV = _without_underflow_(logprobs_RV.sub_(logsumexp_C[rows, None]))
            probs_RV = torch.exp(logprobs_RV, out=grad_CV[rows] if in_place else scratch.second(rows))
            if scaled_grad_entropy_C is None:
                probs_RV.mul_(-scaled_grad_C[rows, None])
            else:
                factor_RV = logprobs_RV.add_(entropy_C[rows, None]).mul_(-scaled_grad_entropy_C[rows, None])
                probs_RV.mul_(factor_RV.sub_(scaled_grad_C[rows, None]))
            columns_R, here_R = _columns(labels_C[rows], first_id, num_ids)
            probs_RV.scatter_add_(1, columns_R[:, None], (scaled_grad_C[rows] * here_R)[:, None])
            if not in_place:
                grad_CV[rows] = probs_RV
        return grad_CV


class _Scratch:
    """Two buffers of the size of one block of rows, and the blocks."""

    def __init__(self, logits_CV: Tensor) -> None:
        self.num_rows, num_ids = logits_CV.shape
        block_elements = _BLOCK_ELEMENTS.get(logits_CV.device.type, _BLOCK_ELEMENTS["cuda"])
        self.rows_per_block = min(max(1, block_elements // num_ids), max(1, self.num_rows))
        self._buffers = logits_CV.new_empty(2, self.rows_per_block, num_ids)

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, self.rows_per_block):
            yield slice(start, min(start + self.rows_per_block, self.num_rows))

    def first(self, rows: slice) -> Tensor:
        return self._buffers[0, : rows.stop - rows.start]

    def second(self, rows: slice) -> Tensor:
        return self._buffers[1, : rows.stop - rows.start]


def _largest(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(the largest logit, its column; the first of equals, or of NaNs), as max(1) but four times as fast on
    CPUs, where amax() is vectorised and the search for an index is not: windows first, then within one."""
    num_ids = logits_RV.shape[1]
    if num_ids <= _WINDOW:
        largest_R, column_R = logits_RV.max(1)
        return largest_R, column_R
    whole = num_ids // _WINDOW * _WINDOW
    windows_RW = logits_RV[:, :whole].unflatten(1, (-1, _WINDOW)).amax(2)
    if whole < num_ids:
        windows_RW = torch.cat([windows_RW, logits_RV[:, whole:].amax(1, keepdim=True)], dim=1)
    largest_R, window_R = windows_RW.max(1)
    # The last window is moved back to be whole: what it then shares with the one before is smaller.
    start_R = (window_R * _WINDOW).clamp_(max=num_ids - _WINDOW)
    columns_RW = start_R[:, None] + torch.arange(_WINDOW, device=logits_RV.device)
    return largest_R, start_R + logits_RV.gather(1, columns_RW).argmax(1)


def _without_underflow_(exponents_RV: Tensor) -> Tensor:
    """Held where exp() is still a normal number (1e-38 in fp32): below it, exp() is ten to thirty times
    slower on CPUs. It also makes 0 of 0 * log 0."""
    return exponents_RV.clamp_(min=math.log(torch.finfo(exponents_RV.dtype).tiny) + 0.1)


def _columns(ids: Tensor, first_id: int, num_ids: int) -> tuple[Tensor, Tensor]:
    """(the column of each id, or any valid one; whether the id is here)."""
    columns = ids - first_id
    here = (columns >= 0) & (columns < num_ids)
    return columns.clamp_(0, num_ids - 1), here


def _pick(logits_CV: Tensor, ids_CK: Tensor, inverse_temperature_C: Tensor, first_id: int) -> Tensor:
    """z / T of the ids, -inf where they are not here."""
    columns_CK, here_CK = _columns(ids_CK, first_id, logits_CV.shape[1])
    picked_CK = logits_CV.gather(1, columns_CK) * inverse_temperature_C[:, None]
    return picked_CK.masked_fill_(~here_CK, -torch.inf)
