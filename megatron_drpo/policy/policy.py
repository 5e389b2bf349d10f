"""The policy: sharded model, optimizer and schedule behind four verbs: train, score, export, state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_drpo.config.schema import Anchor, Config, LogprobMode, Mode
from megatron_drpo.config.schema import RoutingReplay as RoutingReplayName
from megatron_drpo.losses.objective import Objective, build_objective
from megatron_drpo.losses.sft import SftLoss
from megatron_drpo.metrics.diagnostics import Diagnostics
from megatron_drpo.metrics.faulty_tokens import FaultyToken
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.models.registry import get_family
from megatron_drpo.platform.base import Platform
from megatron_drpo.policy.faulty_tokens import leave_out_faulty
from megatron_drpo.policy.forward import (
    ForwardObserver,
    ForwardSettings,
    LogprobForward,
    MicroBatchResult,
    TrainForward,
    check_micro_batch_ids,
)
from megatron_drpo.policy.kernels import build_row_kernels
from megatron_drpo.policy.logprobs import LogprobSettings
from megatron_drpo.policy.model import (
    PolicyModel,
    build_model_chunks,
    build_transformer_config,
    unwrap,
    wrap_data_parallel,
)
from megatron_drpo.policy.numerics import find_non_finite
from megatron_drpo.policy.offload import PolicyMemory
from megatron_drpo.policy.optimizer import (
    apply_gradients,
    build_optimizer,
    compute_gradient_norm,
    compute_learning_rate,
    load_optimizer_state,
    optimizer_step_count,
    set_learning_rate,
    sharded_optimizer_state,
)
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.policy.reference import freeze
from megatron_drpo.policy.routing_replay import Agreement, ReplaySource, RoutingReplay
from megatron_drpo.policy.schedule import finalize_gradients, run_schedule
from megatron_drpo.types import MicroBatch
from megatron_drpo.weights.export import HfExporter
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.load_hf import load_hf_weights
from megatron_drpo.weights.load_megatron import load_megatron_weights
from megatron_drpo.weights.mapping import ParameterMapping

_UPDATE_SOURCES = {
    RoutingReplayName.none: ReplaySource.none,
    RoutingReplayName.rollout: ReplaySource.micro_batch,
    RoutingReplayName.recomputed: ReplaySource.recorded,
}
_SCORE_SOURCES = {
    RoutingReplayName.none: ReplaySource.none,
    RoutingReplayName.rollout: ReplaySource.micro_batch,
    RoutingReplayName.recomputed: ReplaySource.record,
}
"""Of the pass before the step's first update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """One optimizer step, the same on every rank."""

    loss: float
    """Of the whole global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    diagnostics: Diagnostics
    agreement: Agreement = field(default_factory=Agreement)
    """Of the routers with the routes that were replayed."""
    faulty: list[FaultyToken] = field(default_factory=list)
    """Tokens of the global batch that were left out of it; all else here is of the others."""


class Policy:
    """Build it after `initialise_parallel`; every method is collective over all ranks."""

    def __init__(self, config: Config, platform: Platform, parallel: ParallelState) -> None:
        self.config = config
        self.parallel = parallel
        self.pad_to_multiple = math.lcm(
            parallel.pad_to_multiple, parallel.context_size * platform.token_multiple
        )
        """Tokens of a micro-batch are a multiple of it: what the mesh needs, and what suits the platform."""
        self.folder = HfFolder(config.policy.model_path)
        family = get_family(self.folder.config)
        self.architecture = family.architecture(self.folder.config)
        mapping = family.mapping(self.architecture)
        self.transformer_config = build_transformer_config(config, self.architecture, platform)
        chunks = build_model_chunks(self.transformer_config, self.architecture, platform, parallel.device)
        self._load_start(chunks, mapping)
        self.chunks = wrap_data_parallel(chunks, self.transformer_config)
        self.optimizer = build_optimizer(config.optimizer, config.policy.dtype, self.chunks)
        self.transformer_config.finalize_model_grads_func = finalize_gradients
        self.exporter = HfExporter([unwrap(chunk) for chunk in self.chunks], mapping)
        is_sft = config.train.mode is Mode.sft
        self.objective = Objective(loss=SftLoss()) if is_sft else build_objective(config.algorithm)
        """What an update minimises; may be replaced between updates."""
        self.reference_chunks: list[torch.nn.Module] = []
        if self.objective.kl is not None:
            reference = build_model_chunks(
                self.transformer_config, self.architecture, platform, parallel.device
            )
            path = config.algorithm.kl.reference_path
            if path is None:
                self._load_start(reference, mapping)
            else:
                load_hf_weights(reference, HfFolder(path), mapping)
            self.reference_chunks = freeze(reference, self.transformer_config)
        self.memory = PolicyMemory(self.chunks, self.reference_chunks, self.optimizer)
        self.num_updates = 0
        """Optimizer steps done, skipped ones included: the learning rate's clock."""
        self._settings = ForwardSettings(
            logprobs=LogprobSettings(
                vocab_size=self.architecture.vocab_size,
                group=parallel.tensor_group,
                buffer_bytes=config.policy.logprob_buffer_bytes,
                kernels=build_row_kernels(config.policy.logprob_backend, parallel.device),
            ),
            temperature=1.0 if is_sft else config.rollout.temperature,
            sequence_parallel=config.parallel.sequence_parallel,
            one_pass=False,
            replay=self._build_replay(),
        )

    def _build_replay(self) -> RoutingReplay | None:
        parallel = self.parallel
        if self.config.policy.routing_replay is RoutingReplayName.none:
            return None
        layers = [self.architecture.is_moe_layer(i) for i in range(self.architecture.num_layers)]
        splits = self.config.parallel.sequence_parallel
        return RoutingReplay(
            self.chunks,
            layers,
            tensor_rank=parallel.tensor_rank if splits else 0,
            tensor_size=parallel.tensor_size if splits else 1,
        )

    def _load_start(self, chunks: Sequence[PolicyModel], mapping: ParameterMapping) -> None:
        """The weights that the configuration says to start from, into bare chunks."""
        if self.config.policy.weights_path is None:
            load_hf_weights(chunks, self.folder, mapping)
        else:
            load_megatron_weights(chunks, self.config.policy.weights_path, mapping)

    # -------------------------------------------------------------------------------------- updates

    def train_step(self, micro_batches: list[MicroBatch], timer: StepTimer) -> UpdateResult:
        """Forward and backward over this rank's share of a global batch, then one optimizer step. Faulty
        tokens are left out, see `leave_out_faulty`.

        Args:
            micro_batches: as many on every data-parallel rank; a multiple of the pipeline size when
                interleaved (see `round_up_micro_batches`).

        Raises:
            NumericsError: a loss or the gradient norm is not finite; on every rank, before any weight
                has changed.
        """
        total_updates = self.config.train.num_steps * self.config.train.num_updates_per_step
        lr = compute_learning_rate(self.config.optimizer, self.num_updates, total_updates)
        with timer.phase("forward_backward"):
            results = self.forward_backward(micro_batches)
            loss, diagnostics, agreement = self.reduce(results)
            faulty: list[FaultyToken] = []
            if diagnostics.num_faulty:
                micro_batches, faulty = leave_out_faulty(self.config, self.parallel, micro_batches, results)
                loss, diagnostics, agreement = self.reduce(self.forward_backward(micro_batches, again=True))
        with timer.phase("optimizer"):
            grad_norm = compute_gradient_norm(self.optimizer)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise find_non_finite(self, micro_batches, loss, grad_norm)
            set_learning_rate(self.optimizer, lr)
            apply_gradients(self.optimizer, grad_norm)
        self.num_updates += 1
        return UpdateResult(
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            diagnostics=diagnostics,
            agreement=agreement,
            faulty=faulty,
        )

    def forward_backward(
        self, micro_batches: list[MicroBatch], observer: ForwardObserver | None = None, *, again: bool = False
    ) -> list[MicroBatchResult]:
        """Gradients of the objective over this rank's share of a global batch, reduced over replicas.

        Args:
            observer: see `TrainForward`.
            again: the latest call was for the same micro-batches; recorded routes are replayed once more.

        Returns:
            One result per micro-batch on the last stage; nothing elsewhere.
        """
        check_micro_batch_ids(micro_batches, self.architecture.vocab_size)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self._settings.replay is not None:
            self._settings.replay.start_update(again=again)
        forward = TrainForward(self.objective, self.forward_settings, self.parallel, observer)
        return run_schedule(forward, self.chunks, micro_batches, self.parallel.device, forward_only=False)

    @property
    def forward_settings(self) -> ForwardSettings:
        """How an update's logprobs and their gradients are computed, as the objective allows."""
        wants_recompute = self.config.policy.logprob_mode is LogprobMode.recompute
        return replace(
            self._settings,
            one_pass=not (wants_recompute or self.objective.needs_sequences),
            replay_source=_UPDATE_SOURCES[self.config.policy.routing_replay],
        )

    def reduce(self, results: list[MicroBatchResult]) -> tuple[float, Diagnostics, Agreement]:
        """Add up what all ranks saw, over all tokens of the global batch; the same on every rank."""
        totals = Diagnostics.zeros(self.parallel.device)
        loss = torch.zeros(1, dtype=torch.float64, device=self.parallel.device)
        if self.parallel.tensor_rank == 0:
            for result in results:
                loss += result.loss
                totals = totals + result.diagnostics
        # One all-gather, for sums and maxima alike.
        routing = torch.zeros(2, dtype=torch.float64, device=self.parallel.device)
        if self._settings.replay is not None:
            routing += self._settings.replay.take_agreement(routing.device)
        values = torch.cat([loss, routing, totals.sums.flatten(), totals.maxima.flatten()])
        gathered = [torch.empty_like(values) for _ in range(self.parallel.world_size)]
        dist.all_gather(gathered, values)
        ranks = torch.stack(gathered)
        num_maxima = totals.maxima.numel()
        sums, maxima = ranks[:, :-num_maxima].sum(0), ranks[:, -num_maxima:].amax(0)
        diagnostics = Diagnostics(sums=sums[3:].view_as(totals.sums), maxima=maxima.view_as(totals.maxima))
        loss, num_replayed, num_equal = sums[:3].tolist()
        return loss, diagnostics, Agreement(int(num_replayed), int(num_equal))

    # ----------------------------------------------------------------------------------------- scores

    def compute_logprobs(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """[T] logprobs of this rank's tokens of every micro-batch under the current weights; empty before the
        last stage."""
        for chunk in self.chunks:
            chunk.eval()
        source = _SCORE_SOURCES[self.config.policy.routing_replay]
        return self._score(self.chunks, micro_batches, replace(self._settings, replay_source=source))

    def add_logprobs(self, batches: list[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """Give the step's micro-batches what the objective compares with, before the first update: the
        policy's own logprobs (anchor=recomputed) and the reference policy's (kl.coef > 0). Collective."""
        flat = [micro_batch for batch in batches for micro_batch in batch]
        if self._settings.replay is not None:
            self._settings.replay.clear()
        is_rl = self.config.train.mode is Mode.rl
        if is_rl and self.config.algorithm.anchor is Anchor.recomputed:
            flat = _with_field("old_logprobs_T", flat, self.compute_logprobs(flat))
        if self.reference_chunks:
            frozen = replace(self._settings, replay=None)  # it chooses its own experts
            flat = _with_field("ref_logprobs_T", flat, self._score(self.reference_chunks, flat, frozen))
        annotated = iter(flat)
        return [[next(annotated) for _ in batch] for batch in batches]

    @torch.no_grad()
    def _score(
        self, chunks: Sequence[torch.nn.Module], micro_batches: list[MicroBatch], settings: ForwardSettings
    ) -> list[torch.Tensor]:
        check_micro_batch_ids(micro_batches, self.architecture.vocab_size)
        forward = LogprobForward(settings)
        device = self.parallel.device
        return run_schedule(
            forward, chunks, micro_batches, device, forward_only=True, collect_non_loss_data=True
        )

    # ------------------------------------------------------------------------------------------ state

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full HF-named tensors on global rank 0, bucket by bucket; nothing elsewhere."""
        return self.exporter.tensors()

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer as Megatron's sharded tensors, under layout-independent names. Collective."""
        model = self._model_state()
        optimizer = sharded_optimizer_state(self.optimizer, model, is_loading=is_loading)
        return {**model, "optimizer": optimizer}

    def _model_state(self) -> dict[str, Any]:
        return {f"model{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(self.chunks)}

    def load_state(self, state: dict[str, Any], *, optimizer_step: int, num_updates: int) -> None:
        """The inverse of `sharded_state`, from the loaded tensors. Collective."""
        for i, chunk in enumerate(self.chunks):
            unwrap(chunk).load_state_dict(state[f"model{i}"])
        owned = state.get("optimizer", {})  # nothing where this rank owns nothing
        load_optimizer_state(self.optimizer, self._model_state(), owned, optimizer_step)
        self.num_updates = num_updates

    @property
    def optimizer_step(self) -> int:
        """Adam's step number."""
        return optimizer_step_count(self.optimizer)

    def round_up_micro_batches(self, count: int) -> int:
        """The interleaved schedule wants a multiple of the pipeline size."""
        if self.config.parallel.virtual_pipeline_parallel_size == 1:
            return count
        size = self.parallel.pipeline_size
        return -(-count // size) * size


def _with_field(name: str, micro_batches: list[MicroBatch], values: list[torch.Tensor]) -> list[MicroBatch]:
    """The micro-batches with one field set; as they are where there are no values (before the last stage)."""
    if not values:
        return micro_batches
    fields: list[dict[str, Any]] = [{name: value} for value in values]
    return [replace(micro_batch, **field) for micro_batch, field in zip(micro_batches, fields, strict=True)]
