"""Logprobs and entropies of packed tokens from hidden states and a vocabulary shard; no gather of logits.

Logits exist only as [chunk_tokens, V / tp] in fp32, in the forward pass and again in the backward pass,
which recomputes them from the saved log-sum-exp. Tensor-parallel ranks exchange three numbers per token,
in one all-gather per call, and combine them in rank order: all ranks hold bitwise the same result.

    T  tokens        H  hidden size      V  rows of this rank's vocabulary shard
    N  rows that have a loss             C  rows of one chunk
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_drpo.errors import DataError

_MM_HAS_OUT_DTYPE = torch.__version__ >= "2.8"
"""torch.mm(..., out_dtype=) on CUDA: https://github.com/pytorch/pytorch/pull/150812"""


class LogprobOutput(NamedTuple):
    """Per token; fp32, or float64 for float64 inputs; 0 where the mask is False."""

    logprobs_T: Float[Tensor, " T"]
    """Natural log of the label's probability."""
    entropy_T: Float[Tensor, " T"]
    """Entropy of the whole distribution, in nats."""


def vocab_parallel_logprobs(
    hidden_TH: Float[Tensor, "T H"],
    weight_VH: Float[Tensor, "V H"],
    labels_T: Int[Tensor, " T"],
    *,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    mask_T: Bool[Tensor, " T"] | None = None,
) -> LogprobOutput:
    """log softmax(hidden weight^T / temperature) at the labels, and the entropy of that softmax.

    Exact for every vocabulary size and layout, and differentiable in hidden_TH and weight_VH through both
    outputs. hidden_TH, labels_T and mask_T must be equal on all ranks of `group`. The gradient of
    hidden_TH is PARTIAL: the contribution of this rank's vocabulary shard. The caller sums it over
    `group`, as Megatron's copy-to and gather-from-region mappings do. The gradient of weight_VH is
    complete; it is accumulated over chunks in fp32 and returned in the weight's dtype.

    16-bit inputs: products are accumulated and returned in fp32. On CUDA from torch 2.8 on they run on
    16-bit operands (the gradient of the logits is rounded for them); elsewhere the operands are cast up.

    Args:
        hidden_TH: the final hidden states, gathered under sequence parallelism.
        weight_VH: this rank's shard of the output matrix, rows rank * V to (rank + 1) * V of the padded
            vocabulary.
        labels_T: token ids in [0, vocab_size); not read where mask_T is False.
        vocab_size: true size; rows of the padded matrix beyond it take no part.
        temperature: divides the logits.
        group: the tensor-parallel group; None for one rank.
        chunk_tokens: rows of logits held at a time.
        mask_T: rows to compute; the others cost nothing, give 0 and have no gradient. None: all.

    Raises:
        DataError: a label outside the vocabulary; names its position. (This check, like the mask, makes the
            host wait for the device once per call.)
    """
    rows_N = torch.arange(len(labels_T), device=labels_T.device) if mask_T is None else mask_T.nonzero()[:, 0]
    labels_N = labels_T[rows_N]
    _check_labels(labels_N, rows_N, vocab_size)
    shard = _Shard(weight_VH, vocab_size, group)
    outputs = _VocabParallelLogprobs.apply(
        hidden_TH, weight_VH, labels_N, rows_N, shard, 1.0 / temperature, chunk_tokens
    )
    return LogprobOutput(*outputs)


def _check_labels(labels_N: Tensor, rows_N: Tensor, vocab_size: int) -> None:
    wrong_N = (labels_N < 0) | (labels_N >= vocab_size)
    if wrong_N.any():
        first = int(wrong_N.nonzero()[0])
        raise DataError(
            f"labels_T[{int(rows_N[first])}] = {int(labels_N[first])} is outside the vocabulary of "
            f"{vocab_size} tokens: the tokenizer and the model do not belong together"
        )


class _Shard:
    """Where this rank's rows lie in the vocabulary."""

    def __init__(self, weight_VH: Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.world_size = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        rows = weight_VH.shape[0]
        self.first_id = rank * rows
        self.num_ids = min(max(vocab_size - self.first_id, 0), rows)
        """Rows that are tokens; the rest are padding."""

    def locate(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """(whether each label is here, its row here or any valid row)."""
        local_C = labels_C - self.first_id
        here_C = (local_C >= 0) & (local_C < self.num_ids)
        return here_C, local_C.clamp(0, self.num_ids - 1)

    def all_gather(self, statistics_N3: Tensor) -> Tensor:
        """[ranks, N, 3] in rank order. The only collective of the op."""
        if self.world_size == 1 or statistics_N3.numel() == 0:
            return statistics_N3[None].expand(self.world_size, -1, -1)
        gathered = statistics_N3.new_empty(self.world_size, *statistics_N3.shape)
        dist.all_gather(list(gathered.unbind(0)), statistics_N3, group=self.group)
        return gathered


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch types it as (*args, **kwargs)
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        rows_N: Tensor,
        shard: _Shard,
        inverse_temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = _accumulation_dtype(hidden_TH)
        ids_VH = weight_VH[: shard.num_ids]
        statistics_N3 = torch.empty(len(rows_N), 3, dtype=dtype, device=hidden_TH.device)
        chunks = zip(
            rows_N.split(chunk_tokens),
            labels_N.split(chunk_tokens),
            statistics_N3.split(chunk_tokens),
            strict=True,
        )
        for rows_C, labels_C, statistics_C3 in chunks:
            logits_CV = _matmul(hidden_TH[rows_C], ids_VH.t(), dtype).mul_(inverse_temperature)
            _write_statistics(statistics_C3, logits_CV, labels_C, shard)
        logsumexp_N, logprobs_N, entropy_N = _combine(shard.all_gather(statistics_N3))

        ctx.save_for_backward(hidden_TH, weight_VH, labels_N, rows_N, logsumexp_N, entropy_N)
        ctx.constants = (shard, inverse_temperature, chunk_tokens)
        ctx.set_materialize_grads(False)
        zeros_T = torch.zeros(hidden_TH.shape[0], dtype=dtype, device=hidden_TH.device)
        return zeros_T.index_copy(0, rows_N, logprobs_N), zeros_T.index_copy(0, rows_N, entropy_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_N, rows_N, logsumexp_N, entropy_N = ctx.saved_tensors
        shard, inverse_temperature, chunk_tokens = ctx.constants
        grad_logprobs_T, grad_entropy_T = grads
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = _accumulation_dtype(hidden_TH)
        ids_VH = weight_VH[: shard.num_ids]
        grad_hidden_TH = torch.zeros_like(hidden_TH) if needs_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if needs_weight else None
        saved = (rows_N, labels_N, logsumexp_N, entropy_N)
        for rows_C, labels_C, logsumexp_C, entropy_C in zip(
            *(x.split(chunk_tokens) for x in saved), strict=True
        ):
            hidden_CH = hidden_TH[rows_C]
            logprobs_CV = (
                _matmul(hidden_CH, ids_VH.t(), dtype).mul_(inverse_temperature).sub_(logsumexp_C[:, None])
            )
            grad_logits_CV = _grad_logits(
                logprobs_CV,
                shard.locate(labels_C),
                None if grad_logprobs_T is None else grad_logprobs_T[rows_C],
                None if grad_entropy_T is None else grad_entropy_T[rows_C],
                entropy_C,
            ).mul_(inverse_temperature)
            if grad_hidden_TH is not None:
                grad_hidden_TH[rows_C] = _matmul(grad_logits_CV, ids_VH, dtype).to(hidden_TH.dtype)
            if grad_weight_VH is not None:
                grad_weight_VH[: shard.num_ids] += _matmul(grad_logits_CV.t(), hidden_CH, dtype)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated and returned in `dtype`; see `vocab_parallel_logprobs` for 16-bit inputs."""
    if right.is_cuda and right.dtype.itemsize == 2 and _MM_HAS_OUT_DTYPE:
        return torch.mm(left.to(right.dtype), right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _write_statistics(statistics_C3: Tensor, logits_CV: Tensor, labels_C: Tensor, shard: _Shard) -> None:
    """Of this rank's columns: log-sum-exp, entropy of the softmax over them alone, the label's logit.

    Overwrites logits_CV. A rank without the label, or with padding only, writes -inf for what it lacks.
    """
    logsumexp_C, local_entropy_C, label_logits_C = statistics_C3.unbind(1)
    if shard.num_ids == 0:
        logsumexp_C.fill_(-torch.inf)
        local_entropy_C.zero_()
        label_logits_C.fill_(-torch.inf)
        return
    here_C, local_C = shard.locate(labels_C)
    own_logits_C = logits_CV.gather(1, local_C[:, None])[:, 0]
    label_logits_C.copy_(own_logits_C.masked_fill(~here_C, -torch.inf))
    logsumexp_C.copy_(logits_CV.logsumexp(1))
    local_logprobs_CV = logits_CV.sub_(logsumexp_C[:, None])
    local_entropy_C.copy_(-(local_logprobs_CV.exp().mul_(local_logprobs_CV)).sum(1))


def _combine(statistics_RN3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp, label's logprob, entropy) over the whole vocabulary, each [N].

    With q_r the probability of rank r's columns, the chain rule of entropy gives
    H = -sum_r q_r log q_r + sum_r q_r H_r.
    """
    logsumexp_RN, local_entropy_RN, label_logits_RN = statistics_RN3.unbind(2)
    logsumexp_N = logsumexp_RN.logsumexp(0)
    share_RN = (logsumexp_RN - logsumexp_N).exp()
    entropy_N = (torch.special.entr(share_RN) + share_RN * local_entropy_RN).sum(0)
    return logsumexp_N, label_logits_RN.amax(0) - logsumexp_N, entropy_N


def _grad_logits(
    logprobs_CV: Tensor,
    label_position: tuple[Tensor, Tensor],
    grad_logprobs_C: Tensor | None,
    grad_entropy_C: Tensor | None,
    entropy_C: Tensor,
) -> Tensor:
    """d/dz_j = g (1[j = label] - p_j) - h p_j (log p_j + H), for upstream gradients g of logp and h of H."""
    probs_CV = logprobs_CV.exp()
    if grad_entropy_C is None:
        coefficient_CV = torch.zeros_like(logprobs_CV[:, :1])
    else:
        coefficient_CV = logprobs_CV.add_(entropy_C[:, None]).mul_(-grad_entropy_C[:, None])
    if grad_logprobs_C is None:
        return probs_CV.mul_(coefficient_CV)
    grad_CV = probs_CV.mul_(coefficient_CV.sub_(grad_logprobs_C[:, None]))
    here_C, local_C = label_position
    if grad_CV.shape[1] > 0:
        grad_CV.scatter_add_(1, local_C[:, None], (grad_logprobs_C * here_C)[:, None])
    return grad_CV
