"""One micro-batch through Megatron's schedule: hidden states, logprobs, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_drpo.errors import NumericsError
from megatron_drpo.losses.base import Loss
from megatron_drpo.metrics.diagnostics import Diagnostics, compute_diagnostics
from megatron_drpo.policy.logprobs import LogprobOutput, vocab_parallel_logprobs
from megatron_drpo.policy.model import PolicyModel, unwrap
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.types import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobSettings:
    """What the logprob op needs besides tensors."""

    vocab_size: int
    temperature: float
    chunk_tokens: int
    sequence_parallel: bool


def finalize_gradients(model: list[torch.nn.Module], _: object = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction, without its division by a token count.

    The one place where Megatron's own scaling is cancelled: with `calculate_per_token_loss` neither the
    schedule nor DDP divides by micro-batches or replicas, and the token count it would divide by here is
    dropped. What remains is the plain sum that `token_weights_T` already normalises.
    """
    finalize_model_grads(model, num_tokens=None, **kwargs)


def packed_seq_params(micro_batch: MicroBatch) -> PackedSeqParams:
    """Megatron's description of a THD batch."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=micro_batch.cu_seqlens,
        cu_seqlens_kv=micro_batch.cu_seqlens,
        max_seqlen_q=micro_batch.max_seqlen,
        max_seqlen_kv=micro_batch.max_seqlen,
    )


def run_model(micro_batch: MicroBatch, module: torch.nn.Module) -> torch.Tensor:
    """This chunk's output: [T or T / tp, 1, H] hidden states."""
    kwargs: dict[str, Any] = {} if isinstance(unwrap_ddp(module), PolicyModel) else {"fp32_output": False}
    return module(
        micro_batch.token_ids_T[None],
        micro_batch.position_ids_T[None],
        None,
        packed_seq_params=packed_seq_params(micro_batch),
        **kwargs,
    )


def unwrap_ddp(module: Any) -> torch.nn.Module:
    """The module inside DDP: the model, or Float16Module around it."""
    return module if isinstance(module, PolicyModel) else module.module


def logprobs_of(
    hidden: torch.Tensor, model: PolicyModel, micro_batch: MicroBatch, settings: LogprobSettings, group: Any
) -> LogprobOutput:
    """Logprobs and entropies of the packed tokens, from the last stage's hidden states.

    Megatron's mappings give the op the whole [T, H] and add up its partial gradients: a reduce-scatter under
    sequence parallelism, else an all-reduce.
    """
    if settings.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return vocab_parallel_logprobs(
        hidden[:, 0],
        model.output_weight(),
        micro_batch.labels_T,
        vocab_size=settings.vocab_size,
        temperature=settings.temperature,
        group=group,
        chunk_tokens=settings.chunk_tokens,
        mask_T=micro_batch.loss_mask_T,
    )


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    """What the last stage reports of one micro-batch."""

    loss: torch.Tensor
    """float64 scalar, detached: its share of the global batch's loss."""
    diagnostics: Diagnostics


LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, MicroBatchResult]]


class TrainForward:
    """Megatron's forward_step_func for an update."""

    def __init__(self, loss: Loss, settings: LogprobSettings, parallel: ParallelState) -> None:
        self.loss = loss
        self.settings = settings
        self.parallel = parallel

    def __call__(
        self, batches: Iterator[MicroBatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        micro_batch = next(batches)
        output = run_model(micro_batch, module)

        def loss_function(
            hidden: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, MicroBatchResult]:
            result = logprobs_of(
                hidden, unwrap(module), micro_batch, self.settings, self.parallel.tensor_group
            )
            return self._loss(micro_batch, result)

        return output, loss_function

    def _loss(
        self, micro_batch: MicroBatch, result: LogprobOutput
    ) -> tuple[torch.Tensor, torch.Tensor, MicroBatchResult]:
        mask = micro_batch.loss_mask_T
        values = self.loss.value(result.logprobs_T, micro_batch.rollout_logprobs_T, micro_batch.advantages_T)
        # where, not multiplication: a masked token contributes 0 whatever its value.
        total = torch.where(mask, values * micro_batch.token_weights_T, 0.0).sum()
        if not torch.isfinite(total):
            raise NumericsError(
                f"rank {self.parallel.rank}: the loss is {total.item()} in the micro-batch of sequences "
                f"{micro_batch.sequence_ids}"
            )
        diagnostics = compute_diagnostics(
            micro_batch, result.logprobs_T.detach(), result.entropy_T.detach(), self.loss
        )
        no_tokens = torch.zeros((), dtype=torch.int, device=total.device)
        return total, no_tokens, MicroBatchResult(total.detach().double(), diagnostics)


class LogprobForward:
    """Megatron's forward_step_func for logprobs only, [T] per micro-batch, without gradients."""

    def __init__(self, settings: LogprobSettings, parallel: ParallelState) -> None:
        self.settings = settings
        self.parallel = parallel

    def __call__(
        self, batches: Iterator[MicroBatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        micro_batch = next(batches)
        output = run_model(micro_batch, module)

        def collect(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            result = logprobs_of(
                hidden, unwrap(module), micro_batch, self.settings, self.parallel.tensor_group
            )
            return result.logprobs_T

        return output, collect
