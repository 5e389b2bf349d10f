"""One micro-batch through Megatron's schedule: hidden states, logprobs, loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_drpo.losses.objective import Objective
from megatron_drpo.losses.tokens import LossTokens, Sequences, TopK
from megatron_drpo.metrics.diagnostics import Diagnostics, compute_diagnostics
from megatron_drpo.policy.logprobs import (
    ChunkLossResult,
    LogprobOutput,
    LogprobRows,
    LogprobSettings,
    check_ids,
    one_pass_loss,
    vocab_parallel_logprobs,
)
from megatron_drpo.policy.model import PolicyModel, unwrap
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.policy.routing_replay import ReplaySource, RoutingReplay
from megatron_drpo.types import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSettings:
    """How the last stage turns hidden states into logprobs."""

    logprobs: LogprobSettings
    temperature: float
    sequence_parallel: bool
    one_pass: bool
    """The LM head's gradients are formed in the forward pass."""
    replay: RoutingReplay | None = None
    """Of the policy's routers, where routes are replayed or recorded."""
    replay_source: ReplaySource = ReplaySource.none


def check_micro_batch_ids(micro_batches: Sequence[MicroBatch], vocab_size: int) -> None:
    """What `LogprobRows.ids_are_checked` promises, on the host.

    Raises:
        DataError: see `check_ids`.
    """
    for micro_batch in micro_batches:
        rows_N = micro_batch.loss_mask_T.nonzero()[:, 0]
        topk_ids_TK = micro_batch.topk_ids_TK
        rows = LogprobRows(
            rows_N=rows_N,
            labels_N=micro_batch.labels_T[rows_N],
            temperature=1.0,
            topk_ids_NK=None if topk_ids_TK is None else topk_ids_TK[rows_N],
        )
        check_ids(rows, vocab_size)


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


def run_routed_model(
    micro_batch: MicroBatch, module: torch.nn.Module, settings: ForwardSettings, *, has_backward: bool
) -> torch.Tensor:
    """`run_model` with the routes that the settings say."""
    if settings.replay is None:
        return run_model(micro_batch, module)
    with settings.replay.forward(micro_batch, module, settings.replay_source, has_backward=has_backward):
        return run_model(micro_batch, module)


def unwrap_ddp(module: Any) -> torch.nn.Module:
    """The module inside DDP: the model, or Float16Module around it."""
    return module if isinstance(module, PolicyModel) else module.module


def last_hidden_states(hidden: torch.Tensor, *, sequence_parallel: bool) -> torch.Tensor:
    """[T, H] of the last stage's output, for the logprob op.

    Megatron's mappings give the op all tokens and add up its partial gradients: a reduce-scatter under
    sequence parallelism, else an all-reduce.
    """
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    return hidden[:, 0]


@dataclass(frozen=True, slots=True)
class LossRows:
    """The loss tokens of a micro-batch, cut out of its [T] fields: N rows."""

    logprobs: LogprobRows
    token_weights_N: torch.Tensor
    anchor_logprobs_N: torch.Tensor
    rollout_logprobs_N: torch.Tensor
    advantages_N: torch.Tensor
    ref_logprobs_N: torch.Tensor | None
    topk_logprobs_NK: torch.Tensor | None
    sequences: Sequences

    @classmethod
    def of(cls, micro_batch: MicroBatch, temperature: float, context_group: Any = None) -> LossRows:
        """
        Args:
            temperature: of the sampling; it divides the logits.
            context_group: the ranks that share the sequences' tokens, if there are several.
        """
        rows_N = micro_batch.loss_rows_N
        assert rows_N is not None, "run_schedule sends micro-batches through to_device"

        def cut(field_T: torch.Tensor | None) -> Any:
            return None if field_T is None else field_T[rows_N]

        def add_up(sums: torch.Tensor) -> torch.Tensor:
            dist.all_reduce(sums, group=context_group)
            return sums

        rollout_logprobs_N = cut(micro_batch.rollout_logprobs_T)
        has_old = micro_batch.old_logprobs_T is not None
        return cls(
            logprobs=LogprobRows(
                rows_N=rows_N,
                labels_N=cut(micro_batch.labels_T),
                topk_ids_NK=cut(micro_batch.topk_ids_TK),
                temperature=temperature,
                ids_are_checked=True,
            ),
            token_weights_N=cut(micro_batch.token_weights_T),
            anchor_logprobs_N=cut(micro_batch.old_logprobs_T) if has_old else rollout_logprobs_N,
            rollout_logprobs_N=rollout_logprobs_N,
            advantages_N=cut(micro_batch.advantages_T),
            ref_logprobs_N=cut(micro_batch.ref_logprobs_T),
            topk_logprobs_NK=cut(micro_batch.topk_logprobs_TK),
            sequences=Sequences(
                index_N=cut(micro_batch.sequence_index_T),
                num_sequences=len(micro_batch.cu_seqlens) - 1,
                reduce=None if context_group is None else add_up,
            ),
        )

    def tokens(self, output: LogprobOutput, part: slice = slice(None)) -> LossTokens:
        """What the objective reads of these rows, or of a part of them, under the op's output for them."""
        is_whole = part == slice(None)
        topk = None
        if self.topk_logprobs_NK is not None and output.topk_logprobs_NK is not None:
            topk = TopK(logprobs_NK=output.topk_logprobs_NK, rollout_logprobs_NK=self.topk_logprobs_NK[part])
        return LossTokens(
            logprobs_N=output.logprobs_N,
            anchor_logprobs_N=self.anchor_logprobs_N[part],
            rollout_logprobs_N=self.rollout_logprobs_N[part],
            advantages_N=self.advantages_N[part],
            ref_logprobs_N=None if self.ref_logprobs_N is None else self.ref_logprobs_N[part],
            sequences=self.sequences if is_whole else None,
            topk=topk,
        )


@dataclass(frozen=True, slots=True)
class FaultyRows:
    """The loss tokens of a micro-batch that must not be, see `Objective.is_faulty`: F rows, on the host."""

    rows_F: torch.Tensor
    """int64, their positions in T."""
    logprobs_F: torch.Tensor
    rollout_logprobs_F: torch.Tensor


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """All loss tokens of a micro-batch, and which of them are faulty: hardly ever one, so the host only waits
    for their number when it knows that there are any."""

    rows_N: torch.Tensor
    is_faulty_N: torch.Tensor
    logprobs_N: torch.Tensor
    rollout_logprobs_N: torch.Tensor

    @classmethod
    def of(cls, rows: LossRows, tokens: LossTokens, objective: Objective) -> CheckedRows:
        """
        Args:
            tokens: of these rows, detached.
        """
        is_faulty_N = objective.is_faulty(tokens)
        return cls(rows.logprobs.rows_N, is_faulty_N, tokens.logprobs_N, tokens.rollout_logprobs_N)

    def faulty(self) -> FaultyRows:
        """The host waits for the device."""
        columns = (self.rows_N, self.logprobs_N, self.rollout_logprobs_N)
        return FaultyRows(*(column_N[self.is_faulty_N].cpu() for column_N in columns))


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    """What the last stage reports of one micro-batch."""

    loss: torch.Tensor
    """float64 scalar, detached: its share of the global batch's loss."""
    diagnostics: Diagnostics
    checked: CheckedRows


LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, MicroBatchResult]]


class ForwardObserver(Protocol):
    """Is shown what passes through `TrainForward`."""

    def begins(self, micro_batch: MicroBatch) -> None:
        """The model is about to see this micro-batch."""

    def sees(
        self, micro_batch: MicroBatch, rows: LossRows, tokens: LossTokens, entropy_N: torch.Tensor
    ) -> None:
        """The loss has been computed, of these tokens (detached)."""


class TrainForward:
    """Megatron's forward_step_func for an update."""

    def __init__(
        self,
        objective: Objective,
        settings: ForwardSettings,
        parallel: ParallelState,
        observer: ForwardObserver | None = None,
    ) -> None:
        self.objective = objective
        self.settings = settings
        self.parallel = parallel
        self.observer = observer

    def __call__(
        self, batches: Iterator[MicroBatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        micro_batch = next(batches)
        if self.observer is not None:
            self.observer.begins(micro_batch)
        output = run_routed_model(micro_batch, module, self.settings, has_backward=True)

        def loss_function(
            hidden: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor, MicroBatchResult]:
            return self._loss(micro_batch, hidden, unwrap(module))

        return output, loss_function

    def _loss(
        self, micro_batch: MicroBatch, hidden: torch.Tensor, model: PolicyModel
    ) -> tuple[torch.Tensor, torch.Tensor, MicroBatchResult]:
        hidden_TH = last_hidden_states(hidden, sequence_parallel=self.settings.sequence_parallel)
        context_group = self.parallel.context_group if self.parallel.context_size > 1 else None
        rows = LossRows.of(micro_batch, self.settings.temperature, context_group)
        compute = self._one_pass if self.settings.one_pass else self._recompute
        total, output = compute(hidden_TH, model.output_weight(), rows)
        output = output.detach()
        tokens = rows.tokens(output)
        if self.observer is not None:
            self.observer.sees(micro_batch, rows, tokens, output.entropy_N)
        diagnostics = compute_diagnostics(tokens, output.entropy_N, self.objective)
        no_tokens = torch.zeros((), dtype=torch.int, device=total.device)
        checked = CheckedRows.of(rows, tokens, self.objective)
        return total, no_tokens, MicroBatchResult(total.detach().double(), diagnostics, checked)

    def _recompute(
        self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, rows: LossRows
    ) -> tuple[torch.Tensor, LogprobOutput]:
        output = vocab_parallel_logprobs(hidden_TH, weight_VH, rows.logprobs, self.settings.logprobs)
        value_N = self.objective.value(rows.tokens(output), output.entropy_N)
        return (value_N * rows.token_weights_N).sum(), output

    def _one_pass(
        self, hidden_TH: torch.Tensor, weight_VH: torch.Tensor, rows: LossRows
    ) -> tuple[torch.Tensor, LogprobOutput]:
        """Gradients in closed form as soon as a chunk's logprobs are known."""

        def loss_of(part: slice, output: LogprobOutput) -> ChunkLossResult:
            tokens, weights_C = rows.tokens(output, part), rows.token_weights_N[part]
            entropy_coef = self.objective.entropy_coef
            return ChunkLossResult(
                loss=(self.objective.value(tokens, output.entropy_N) * weights_C).sum(),
                grad_logprobs_C=self.objective.logprob_gradient(tokens) * weights_C,
                grad_entropy_C=-entropy_coef * weights_C if entropy_coef else None,
            )

        return one_pass_loss(hidden_TH, weight_VH, rows.logprobs, self.settings.logprobs, loss_of)


class LogprobForward:
    """Megatron's forward_step_func for logprobs only, [T] per micro-batch (0 where there is no loss), without
    gradients."""

    def __init__(self, settings: ForwardSettings) -> None:
        self.settings = settings

    def __call__(
        self, batches: Iterator[MicroBatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        micro_batch = next(batches)
        output = run_routed_model(micro_batch, module, self.settings, has_backward=False)

        def collect(hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            hidden_TH = last_hidden_states(hidden, sequence_parallel=self.settings.sequence_parallel)
            rows_N = micro_batch.loss_rows_N
            assert rows_N is not None, "run_schedule sends micro-batches through to_device"
            rows = LogprobRows(
                rows_N=rows_N,
                labels_N=micro_batch.labels_T[rows_N],
                temperature=self.settings.temperature,
                ids_are_checked=True,
            )
            weight_VH = unwrap(module).output_weight()
            result = vocab_parallel_logprobs(hidden_TH, weight_VH, rows, self.settings.logprobs)
            zeros_T = result.logprobs_N.new_zeros(micro_batch.num_tokens)
            return zeros_T.index_copy(0, rows_N, result.logprobs_N)

        return output, collect
