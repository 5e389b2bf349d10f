"""Logprobs, entropies and their gradients from hidden states and a vocabulary shard; no gather of logits.

Logits exist only as a chunk of rows, [C, V] in fp32 in one buffer. Tensor-parallel ranks exchange 5 + K
numbers per token and combine them in rank order: all ranks hold bitwise the same result. Two modes:

- `vocab_parallel_logprobs` is an ordinary differentiable function. One all-gather per call; the backward
  pass computes the logits again from the saved log-sum-exp: four matrix products in all.
- `one_pass_loss` needs a loss whose gradient is known once the logprobs are. It forms all gradients in the
  forward pass while a chunk's logits are at hand: three matrix products, the least that is possible. A
  chunk's gradients need the log-sum-exp over all ranks, so there is one all-gather per chunk (the sum over
  tokens in the weight's gradient has to wait for it); where `buffer_bytes` holds all rows, exactly one.

    T  tokens        H  hidden size      V  rows of this rank's vocabulary shard
    N  rows that have a loss             C  rows of one chunk
    K  given ids per row
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_drpo.errors import DataError
from megatron_drpo.policy.kernels.base import RowKernels
from megatron_drpo.policy.vocabulary import Combined, VocabularyShard, combine
from megatron_drpo.policy.weight_gradient import WeightGradient


class LogprobOutput(NamedTuple):
    """Per row that has a loss; fp32, or float64 for float64 inputs. Natural logarithms."""

    logprobs_N: Float[Tensor, " N"]
    """Of the label."""
    entropy_N: Float[Tensor, " N"]
    """Of the whole distribution."""
    max_logprobs_N: Float[Tensor, " N"]
    """Of the most probable id; no gradient."""
    argmax_N: Int[Tensor, " N"]
    """That id, int64; the lowest of equals."""
    topk_logprobs_NK: Float[Tensor, "N K"] | None
    """Of the given ids, if any; no gradient."""

    def detach(self) -> LogprobOutput:
        """The same without a graph."""
        return self._replace(logprobs_N=self.logprobs_N.detach(), entropy_N=self.entropy_N.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobRows:
    """The tokens that have a loss; equal on all tensor-parallel ranks. The others cost nothing."""

    rows_N: Int[Tensor, " N"]
    """int64, their positions in T, each once."""
    labels_N: Int[Tensor, " N"]
    """Token ids in [0, vocab_size)."""
    temperature: float | Tensor
    """Divides the logits; one for all, or [N]."""
    topk_ids_NK: Int[Tensor, "N K"] | None = None
    """Further ids whose logprobs are wanted."""
    ids_are_checked: bool = False
    """`check_ids` has seen them on the host; else the host waits until the device has looked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobSettings:
    """What the op needs besides tensors."""

    vocab_size: int
    """True size; rows of the padded matrix beyond it take no part."""
    group: dist.ProcessGroup | None
    """The tensor-parallel ranks; None for one rank."""
    buffer_bytes: int
    """For the logits of a chunk; at least one row is taken."""
    kernels: RowKernels


class ChunkLossResult(NamedTuple):
    """The loss of a chunk and its gradient in closed form."""

    loss: Float[Tensor, ""]
    """Weighted and summed over the chunk's rows."""
    grad_logprobs_C: Float[Tensor, " C"]
    """dLoss/dlogprob per row."""
    grad_entropy_C: Float[Tensor, " C"] | None = None
    """dLoss/dentropy per row; None where it is 0."""


ChunkLoss = Callable[[slice, LogprobOutput], ChunkLossResult]
"""Of the part [start, stop) of the rows, given what the op found for them. Called without autograd."""


def vocab_parallel_logprobs(
    hidden_TH: Float[Tensor, "T H"],
    weight_VH: Float[Tensor, "V H"],
    rows: LogprobRows,
    settings: LogprobSettings,
) -> LogprobOutput:
    """log softmax(hidden weight^T / temperature) at the labels, and what else `LogprobOutput` has.

    Exact for every vocabulary size and layout; differentiable in hidden_TH and weight_VH through logprobs
    and entropy. Without rows nothing is computed and gradients are 0.

    hidden_TH must be equal on all ranks of the group. Its gradient is PARTIAL, the contribution of this
    rank's shard: the caller sums it over the group, as Megatron's copy-to and gather-from-region mappings
    do. The gradient of weight_VH is complete and is summed over chunks in fp32; it goes into the weight's
    `main_grad`, if there is one (see `WeightGradient`), else to autograd in the weight's dtype.

    16-bit inputs: see `vocabulary.py`.

    Args:
        hidden_TH: the final hidden states, gathered under sequence parallelism.
        weight_VH: this rank's shard of the output matrix, rows rank * V to (rank + 1) * V of the padded
            vocabulary.

    Raises:
        DataError: an id outside the vocabulary; names its position.
    """
    if not rows.ids_are_checked:
        check_ids(rows, settings.vocab_size)
    return _output(_Recompute.apply(hidden_TH, weight_VH, rows, settings), rows)


def one_pass_loss(
    hidden_TH: Float[Tensor, "T H"],
    weight_VH: Float[Tensor, "V H"],
    rows: LogprobRows,
    settings: LogprobSettings,
    loss_of: ChunkLoss,
) -> tuple[Float[Tensor, ""], LogprobOutput]:
    """(the loss summed over all rows, what it was computed from, without gradients).

    The loss is differentiable in hidden_TH and weight_VH like that of `vocab_parallel_logprobs`, and the
    same in value and gradient; but the gradients are formed here, and the backward pass only hands them on.
    Hence it must be the end of the graph: `loss.backward()` of the loss as it is, once. With a `main_grad`
    the weight's gradient is in it when this function returns, whether the backward pass runs or not. Under
    torch.no_grad(), or where neither input requires a gradient, none is formed.

    Raises:
        DataError: as `vocab_parallel_logprobs`.
        RuntimeError: in the backward pass, if the loss was scaled or added to something with a weight; on
            CUDA when the device gets there.
    """
    if not rows.ids_are_checked:
        check_ids(rows, settings.vocab_size)
    needs_grad = torch.is_grad_enabled()
    wanted = (needs_grad and hidden_TH.requires_grad, needs_grad and weight_VH.requires_grad)
    loss, *outputs = _OnePass.apply(hidden_TH, weight_VH, rows, settings, loss_of, wanted)
    return loss, _output(outputs, rows)


def _output(tensors: Any, rows: LogprobRows) -> LogprobOutput:
    """From the tensors that an autograd function returned."""
    logprobs_N, entropy_N, max_logprobs_N, argmax_N, topk_logprobs_NK = tensors
    topk = None if rows.topk_ids_NK is None else topk_logprobs_NK
    return LogprobOutput(logprobs_N, entropy_N, max_logprobs_N, argmax_N, topk)


def check_ids(rows: LogprobRows, vocab_size: int) -> None:
    """Whether all ids are in the vocabulary.

    Raises:
        DataError: one is not; names its position.
    """
    given = [("label", rows.labels_N[:, None])]
    if rows.topk_ids_NK is not None:
        given.append(("top-k id", rows.topk_ids_NK))
    wrong = torch.cat([(ids < 0) | (ids >= vocab_size) for _, ids in given], dim=1)
    if not wrong.any():
        return
    row, column = wrong.nonzero()[0].tolist()
    name, ids = given[0] if column == 0 else given[1]
    raise DataError(
        f"the {name} {int(ids[row, max(column - 1, 0)])} of token {int(rows.rows_N[row])} of the micro-batch "
        f"is outside the vocabulary of {vocab_size} ids: the tokenizer and the model do not belong together"
    )


class _Head:
    """The LM head on the rows that have a loss, chunk by chunk."""

    def __init__(
        self, hidden_TH: Tensor, weight_VH: Tensor, rows: LogprobRows, settings: LogprobSettings
    ) -> None:
        self.hidden_TH = hidden_TH
        self.rows = rows
        self.kernels = settings.kernels
        self.shard = VocabularyShard(weight_VH, settings.vocab_size, settings.group)
        self.num_rows = len(rows.rows_N)
        dtype = self.shard.dtype
        bytes_per_row = self.shard.num_rows * dtype.itemsize
        if self.shard.operand_dtype is not dtype:  # kernels may write the operands beside the logits
            bytes_per_row += self.shard.num_rows * self.shard.operand_dtype.itemsize
        # Of the padded shard's size, which is the same on all ranks: their all-gathers must match.
        self.rows_per_chunk = max(1, settings.buffer_bytes // max(1, bytes_per_row))
        temperature = rows.temperature
        if not isinstance(temperature, Tensor):  # filled on the device, where a copy would make the host wait
            temperature = torch.full((), temperature, dtype=dtype, device=hidden_TH.device)
        self.inverse_temperature_N = (1 / temperature.to(dtype)).expand(self.num_rows).contiguous()
        self._buffer_CV = torch.empty(
            min(self.rows_per_chunk, self.num_rows), self.shard.num_ids, dtype=dtype, device=hidden_TH.device
        )

    def parts(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, self.rows_per_chunk):
            yield slice(start, min(start + self.rows_per_chunk, self.num_rows))

    def logits(self, part: slice) -> tuple[Tensor, Tensor]:
        """(hidden states [C, H] of these rows, their logits [C, V], which the next call overwrites)."""
        hidden_CH = self.hidden_TH[self.rows.rows_N[part]]
        logits_CV = self._buffer_CV[: len(hidden_CH)]
        self.shard.write_logits(logits_CV, hidden_CH)
        return hidden_CH, logits_CV

    def statistics(self, part: slice, logits_CV: Tensor) -> Tensor:
        topk_ids_NK = self.rows.topk_ids_NK
        return self.kernels.statistics(
            logits_CV,
            self.rows.labels_N[part],
            self.inverse_temperature_N[part],
            None if topk_ids_NK is None else topk_ids_NK[part],
            first_id=self.shard.first_id,
        )

    def empty_statistics(self) -> Tensor:
        """[N, 5 + K], to be filled."""
        num_topk = 0 if self.rows.topk_ids_NK is None else self.rows.topk_ids_NK.shape[1]
        return self._buffer_CV.new_empty(self.num_rows, 5 + num_topk)

    def grad_logits(
        self,
        part: slice,
        logits_CV: Tensor,
        logsumexp_C: Tensor,
        entropy_C: Tensor,
        grads_C: tuple[Tensor, Tensor | None],
    ) -> Tensor:
        """From the upstream gradients of logprobs and entropy; overwrites the logits."""
        grad_logprobs_C, grad_entropy_C = grads_C
        return self.kernels.grad_logits_(
            logits_CV,
            self.rows.labels_N[part],
            self.inverse_temperature_N[part],
            logsumexp_C,
            entropy_C,
            grad_logprobs_C.to(self.shard.dtype),
            None if grad_entropy_C is None else grad_entropy_C.to(self.shard.dtype),
            first_id=self.shard.first_id,
            dtype=self.shard.operand_dtype,
        )


class _Gradients:
    """Of the hidden states and the weight, chunk by chunk; only of those that are wanted."""

    def __init__(self, head: _Head, weight_VH: Tensor, wanted: tuple[bool, bool]) -> None:
        self._head = head
        self.hidden_TH = torch.zeros_like(head.hidden_TH, requires_grad=False) if wanted[0] else None
        self.weight = WeightGradient(weight_VH) if wanted[1] else None

    def add(self, part: slice, grad_logits_CV: Tensor, hidden_CH: Tensor) -> None:
        if self.hidden_TH is not None:
            grad_CH = self._head.shard.grad_hidden(grad_logits_CV)
            self.hidden_TH[self._head.rows.rows_N[part]] = grad_CH.to(self.hidden_TH.dtype)
        if self.weight is not None:
            self.weight.add(grad_logits_CV, hidden_CH)


def _tensors(combined: Combined) -> tuple[Tensor, ...]:
    """The fields of `LogprobOutput`."""
    return (
        combined.logprobs_N,
        combined.entropy_N,
        combined.max_logprobs_N,
        combined.argmax_N,
        combined.topk_logprobs_NK,
    )


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch types it as (*args, **kwargs)
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, rows: LogprobRows, settings: LogprobSettings
    ) -> tuple[Tensor, ...]:
        head = _Head(hidden_TH, weight_VH, rows, settings)
        statistics_NS = head.empty_statistics()
        for part in head.parts():
            _, logits_CV = head.logits(part)
            statistics_NS[part] = head.statistics(part, logits_CV)
        combined = combine(head.shard.all_gather(statistics_NS))
        ctx.save_for_backward(hidden_TH, weight_VH, combined.logsumexp_N, combined.entropy_N)
        ctx.rows, ctx.settings = rows, settings
        ctx.set_materialize_grads(False)
        tensors = _tensors(combined)
        ctx.mark_non_differentiable(*tensors[2:])
        return tensors

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]  # the decorator drops the parameter's name
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, logsumexp_N, entropy_N = ctx.saved_tensors
        head = _Head(hidden_TH, weight_VH, ctx.rows, ctx.settings)
        gradients = _Gradients(head, weight_VH, ctx.needs_input_grad[:2])
        grad_logprobs_N, grad_entropy_N = grads[:2]
        if grad_logprobs_N is None:
            grad_logprobs_N = torch.zeros_like(logsumexp_N)
        for part in head.parts():
            hidden_CH, logits_CV = head.logits(part)
            grad_entropy_C = None if grad_entropy_N is None else grad_entropy_N[part]
            grad_logits_CV = head.grad_logits(
                part, logits_CV, logsumexp_N[part], entropy_N[part], (grad_logprobs_N[part], grad_entropy_C)
            )
            gradients.add(part, grad_logits_CV, hidden_CH)
        grad_weight = None if gradients.weight is None else gradients.weight.for_autograd()
        return gradients.hidden_TH, grad_weight, None, None


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch types it as (*args, **kwargs)
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        rows: LogprobRows,
        settings: LogprobSettings,
        loss_of: ChunkLoss,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        head = _Head(hidden_TH, weight_VH, rows, settings)
        gradients = _Gradients(head, weight_VH, wanted)
        loss = torch.zeros((), dtype=head.shard.dtype, device=hidden_TH.device)
        found = [combine(head.empty_statistics()[None])] if head.num_rows == 0 else []
        for part in head.parts():
            hidden_CH, logits_CV = head.logits(part)
            combined = combine(head.shard.all_gather(head.statistics(part, logits_CV)))
            found.append(combined)
            result = loss_of(part, _output(_tensors(combined), rows))
            loss = loss + result.loss
            if any(wanted):
                grad_logits_CV = head.grad_logits(
                    part, logits_CV, combined.logsumexp_N, combined.entropy_N, result[1:]
                )
                gradients.add(part, grad_logits_CV, hidden_CH)
        outputs = tuple(torch.cat(tensors) for tensors in zip(*map(_tensors, found), strict=True))
        ctx.gradients = (gradients.hidden_TH, gradients.weight)  # and not the buffer
        ctx.mark_non_differentiable(*outputs)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]  # the decorator drops the parameter's name
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        _check_is_one(grads[0])
        if not hasattr(ctx, "gradients"):
            raise RuntimeError("one_pass_loss: a second backward pass, but the gradients were given away")
        grad_hidden_TH, weight = ctx.gradients
        del ctx.gradients
        grad_weight = None if weight is None else weight.for_autograd()
        return grad_hidden_TH, grad_weight, None, None, None, None


def _check_is_one(grad_loss: Tensor) -> None:
    message = "one_pass_loss has already formed its gradients: its loss must not be scaled or weighted"
    if grad_loss.is_cuda:
        torch._assert_async((grad_loss == 1).all(), message)
    elif not bool(grad_loss == 1):
        raise RuntimeError(message)
