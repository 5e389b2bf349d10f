"""Row kernels in Triton: logits are read once for the statistics, read and overwritten once for the gradient.

Notation as in `base.py`. One program per token goes through its row block by block; nothing is exchanged
between programs and there are no atomics, so results are the same in every run.

Block sizes: a buffer of 256 MiB holds 3500 to 440 rows of 19k to 152k columns, three or more programs for
each of an H100's 132 SMs. With 16 warps, a thread has 4 (statistics) or 8 (gradient) columns of a block in at
most 40 registers, so that three such programs fit at once, and they have 24 kB of 16-byte loads under way; an
SM's share of the memory's bandwidth, times its latency, is below 20 kB. The main loop of the statistics
reduces nothing across threads: no warp waits for another.

Without a GPU the kernels run in Triton's interpreter: TRITON_INTERPRET=1 must be in the environment before
the process first imports triton, as tests/conftest.py sets it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_drpo.policy.kernels.base import NUM_STATISTICS

_jit: Any = triton.jit  # untyped: a kernel's arguments are pointers inside and tensors outside
_NUM_WARPS = 16
_STATISTICS_BLOCK = 2048
_GRADIENT_BLOCK = 4096

_LOWEST = tl.constexpr(-1e20)
"""Logits below count as -inf. It is finite: differences of two are no NaN, and sums of products with it fit
into fp32."""
_NO_PROBABILITY = tl.constexpr(-1e4)
"""exp() of it is 0, also in float64."""


class TritonRows:
    """`RowKernels` by fused kernels; rows do not influence each other. Logits are fp32 or float64."""

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
        if num_ids == 0:
            result[:, [1, 4]] = 0.0
        elif num_rows:
            _statistics_kernel[(num_rows,)](
                result,
                logits_CV,
                labels_C.contiguous(),
                inverse_temperature_C.contiguous(),
                labels_C if topk_ids_CK is None else topk_ids_CK.contiguous(),
                logits_CV.stride(0),
                num_ids,
                first_id,
                num_given,
                PICKED_BLOCK=triton.next_power_of_2(1 + num_given),
                BLOCK=_STATISTICS_BLOCK,
                num_warps=_NUM_WARPS,
            )
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
        if INTERPRETED and dtype is torch.bfloat16:  # the interpreter truncates, where GPUs and torch round
            return self.grad_logits_(
                logits_CV,
                labels_C,
                inverse_temperature_C,
                logsumexp_C,
                entropy_C,
                grad_logprobs_C,
                grad_entropy_C,
                first_id=first_id,
                dtype=logits_CV.dtype,
            ).to(dtype)
        num_rows, num_ids = logits_CV.shape
        # A narrower result takes the front of each row.
        grad_CV = logits_CV if dtype is logits_CV.dtype else logits_CV.view(dtype)[:, :num_ids]
        if num_rows and num_ids:
            _grad_logits_kernel[(num_rows,)](
                grad_CV,
                logits_CV,
                labels_C.contiguous(),
                inverse_temperature_C.contiguous(),
                logsumexp_C.contiguous(),
                entropy_C.contiguous(),
                grad_logprobs_C.contiguous(),
                grad_logprobs_C if grad_entropy_C is None else grad_entropy_C.contiguous(),
                logits_CV.stride(0),
                grad_CV.stride(0),
                num_ids,
                first_id,
                HAS_GRAD_ENTROPY=grad_entropy_C is not None,
                IS_NARROWER=dtype is not logits_CV.dtype,
                BLOCK=_GRADIENT_BLOCK,
                num_warps=_NUM_WARPS,
            )
        return grad_CV


@_jit
def _statistics_kernel(
    result: tl.tensor,
    logits: tl.tensor,
    labels: tl.tensor,
    inverse_temperature: tl.tensor,
    given_ids: tl.tensor,
    row_stride: tl.tensor,
    num_ids: tl.tensor,
    first_id: tl.tensor,
    num_given: tl.tensor,
    PICKED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Every lane keeps an online softmax of the columns it meets: m the largest z, s the sum of
    e = exp((z - m) / T), t the sum of e log e, and the block where z = m came first. A z takes one
    exponential, whether or not it is a new maximum."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    scale = tl.load(inverse_temperature + row).to(logits.dtype.element_ty)  # pyrefly: ignore[missing-attribute]
    lanes = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], _LOWEST, logits.dtype.element_ty)  # pyrefly: ignore[missing-attribute]
    s = tl.zeros([BLOCK], logits.dtype.element_ty)  # pyrefly: ignore[missing-attribute]
    t = tl.zeros([BLOCK], logits.dtype.element_ty)  # pyrefly: ignore[missing-attribute]
    block = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_ids, BLOCK):  # pyrefly: ignore[bad-argument-type]
        columns = start + lanes
        z = tl.load(logits + columns, mask=columns < num_ids, other=-float("inf"))
        difference = (z - m) * scale
        is_larger = difference > 0
        e = tl.exp(-tl.abs(difference))
        difference = tl.maximum(difference, _NO_PROBABILITY)
        t = tl.where(is_larger, e * (t - difference * s), t + e * difference)
        s = tl.where(is_larger, e * s + 1.0, s + e)
        m = tl.where(is_larger, z, m)
        block = tl.where(is_larger, start, block)

    largest = tl.max(m, 0)
    difference = (m - largest) * scale
    e = tl.exp(difference)
    total = tl.sum(e * s, 0)
    total_e_log_e = tl.sum(e * (t + difference * s), 0)
    column = tl.min(tl.where(m == largest, block + lanes, num_ids), 0)
    is_empty = total == 0
    largest = tl.where(is_empty, -float("inf"), tl.where(total > 0, largest * scale, total))  # a NaN shows
    total = tl.where(is_empty, 1.0, total)
    log_total = tl.log(total)

    result += row * (5 + num_given)
    tl.store(result, largest + log_total)
    tl.store(result + 1, log_total - total_e_log_e / total)
    tl.store(result + 3, largest)
    tl.store(result + 4, column + first_id)
    k = tl.arange(0, PICKED_BLOCK)  # 0: the label; from 1 on: the given ids
    label = tl.load(labels + row)
    mask = (k > 0) & (k <= num_given)
    picked_column = tl.load(given_ids + row * num_given + k - 1, mask=mask, other=label) - first_id
    is_here = (picked_column >= 0) & (picked_column < num_ids)
    picked = tl.load(logits + picked_column, mask=is_here, other=-float("inf")) * scale
    tl.store(result + tl.where(k == 0, 2, 4 + k), picked, mask=k <= num_given)


@_jit
def _grad_logits_kernel(
    grad_logits: tl.tensor,
    logits: tl.tensor,
    labels: tl.tensor,
    inverse_temperature: tl.tensor,
    logsumexp: tl.tensor,
    entropy: tl.tensor,
    grad_logprobs: tl.tensor,
    grad_entropy: tl.tensor,
    row_stride: tl.tensor,
    grad_row_stride: tl.tensor,
    num_ids: tl.tensor,
    first_id: tl.tensor,
    HAS_GRAD_ENTROPY: tl.constexpr,
    IS_NARROWER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`grad_logits` lies in the memory of `logits`, each row at the start of its row.

    Block i is read from byte 4 i BLOCK on (fp32) and a 16-bit result ends before byte 2 (i + 1) BLOCK: no
    later block is overwritten before it is read. Of this block and earlier ones, all threads have read their
    part once they have passed the barrier."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    grad_logits += row * grad_row_stride
    scale = tl.load(inverse_temperature + row).to(logits.dtype.element_ty)  # pyrefly: ignore[missing-attribute]
    lse = tl.load(logsumexp + row).to(logits.dtype.element_ty)  # pyrefly: ignore[missing-attribute]
    g = tl.load(grad_logprobs + row).to(logits.dtype.element_ty) * scale  # pyrefly: ignore[missing-attribute]
    label = tl.load(labels + row) - first_id
    h = 0.0
    row_entropy = 0.0
    if HAS_GRAD_ENTROPY:
        h = tl.load(grad_entropy + row).to(logits.dtype.element_ty) * scale  # pyrefly: ignore[missing-attribute]
        row_entropy = tl.load(entropy + row).to(logits.dtype.element_ty)  # pyrefly: ignore[missing-attribute]
    for start in range(0, num_ids, BLOCK):  # pyrefly: ignore[bad-argument-type]
        columns = start + tl.arange(0, BLOCK)
        mask = columns < num_ids
        z = tl.load(logits + columns, mask=mask, other=-float("inf"))
        if IS_NARROWER:
            tl.debug_barrier()
        logp = z * scale - lse
        p = tl.exp(logp)
        if HAS_GRAD_ENTROPY:
            logp = tl.maximum(logp, _NO_PROBABILITY)  # 0 log 0 = 0
            factor = g + h * (logp + row_entropy)
        else:
            factor = g
        grad = tl.where(columns == label, g, 0.0) - p * factor
        tl.store(grad_logits + columns, grad.to(grad_logits.dtype.element_ty), mask=mask)  # pyrefly: ignore[missing-attribute]


INTERPRETED = not isinstance(_statistics_kernel, triton.JITFunction)
"""Whether this process runs the kernels in Triton's interpreter, on any device."""
