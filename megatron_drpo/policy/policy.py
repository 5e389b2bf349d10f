"""The policy: sharded model, optimizer and schedule behind four verbs: train, score, export, state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_drpo.config import Config, Mode
from megatron_drpo.errors import NumericsError
from megatron_drpo.hf_io import HfFolder
from megatron_drpo.losses.registry import build_loss
from megatron_drpo.losses.sft import SftLoss
from megatron_drpo.metrics.diagnostics import Diagnostics
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.models.export import HfExporter
from megatron_drpo.models.load import load_hf_weights
from megatron_drpo.models.registry import get_family
from megatron_drpo.packing import to_device
from megatron_drpo.platform import Platform
from megatron_drpo.policy.forward import (
    LogprobForward,
    LogprobSettings,
    MicroBatchResult,
    TrainForward,
    finalize_gradients,
)
from megatron_drpo.policy.model import (
    build_model_chunks,
    build_transformer_config,
    unwrap,
    wrap_data_parallel,
)
from megatron_drpo.policy.optimizer import (
    build_optimizer,
    compute_learning_rate,
    load_optimizer_state,
    optimizer_step_count,
    set_learning_rate,
    sharded_optimizer_state,
)
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.types import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """One optimizer step, the same on every rank."""

    loss: float
    """Of the whole global batch."""
    grad_norm: float
    """Before clipping."""
    lr: float
    diagnostics: Diagnostics


class Policy:
    """Build it after `initialise_parallel`; every method is collective over all ranks."""

    def __init__(self, config: Config, platform: Platform, parallel: ParallelState) -> None:
        self.config = config
        self.parallel = parallel
        self.folder = HfFolder(config.policy.model_path)
        family = get_family(self.folder.config)
        self.architecture = family.architecture(self.folder.config)
        mapping = family.mapping(self.architecture)
        self.transformer_config = build_transformer_config(config, self.architecture, platform)
        chunks = build_model_chunks(self.transformer_config, self.architecture, platform, parallel.device)
        load_hf_weights(chunks, self.folder, mapping)
        self.chunks = wrap_data_parallel(chunks, self.transformer_config)
        self.optimizer = build_optimizer(config.optimizer, config.policy.dtype, self.chunks)
        self.transformer_config.finalize_model_grads_func = finalize_gradients
        self.transformer_config.grad_scale_func = self.optimizer.scale_loss
        self.exporter = HfExporter([unwrap(chunk) for chunk in self.chunks], mapping)
        self.loss = SftLoss() if config.train.mode is Mode.sft else build_loss(config.algorithm.loss)
        self.num_updates = 0
        """Optimizer steps done, skipped ones included: the learning rate's clock."""
        self._settings = LogprobSettings(
            vocab_size=self.architecture.vocab_size,
            temperature=1.0 if config.train.mode is Mode.sft else config.rollout.temperature,
            chunk_tokens=config.policy.logprob_chunk_tokens,
            sequence_parallel=config.parallel.sequence_parallel,
        )
        self._schedule = get_forward_backward_func()

    def train_step(self, micro_batches: list[MicroBatch], timer: StepTimer) -> UpdateResult:
        """Forward and backward over this rank's share of a global batch, then one optimizer step.

        Args:
            micro_batches: as many on every data-parallel rank; a multiple of the pipeline size when
                interleaved (see `round_up_micro_batches`).

        Raises:
            NumericsError: a loss or the gradient norm is not finite.
        """
        total_updates = self.config.train.num_steps * self.config.train.num_updates_per_step
        lr = compute_learning_rate(self.config.optimizer, self.num_updates, total_updates)
        set_learning_rate(self.optimizer, lr)
        with timer.phase("forward_backward"):
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            forward = TrainForward(self.loss, self._settings, self.parallel)
            results = self._run(forward, micro_batches, forward_only=False)
        with timer.phase("optimizer"):
            _, grad_norm, _ = cast(tuple[Any, Any, Any], self.optimizer.step())
        self.num_updates += 1
        loss, diagnostics = self._reduce(results)
        norm = 0.0 if grad_norm is None else float(grad_norm)
        if not math.isfinite(norm):
            raise NumericsError(
                f"rank {self.parallel.rank}: the gradient norm of update {self.num_updates} is {norm}"
            )
        return UpdateResult(loss=loss, grad_norm=norm, lr=lr, diagnostics=diagnostics)

    @torch.no_grad()
    def compute_logprobs(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """[T] logprobs of this rank's tokens of every micro-batch under the current weights.

        Empty before the last stage.
        """
        for chunk in self.chunks:
            chunk.eval()
        forward = LogprobForward(self._settings, self.parallel)
        return self._run(forward, micro_batches, forward_only=True, collect_non_loss_data=True)

    def _run(self, forward: Any, micro_batches: list[MicroBatch], **kwargs: Any) -> list[Any]:
        on_device = [to_device(micro_batch, self.parallel.device) for micro_batch in micro_batches]
        iterators = [iter(on_device) for _ in self.chunks]
        several = len(self.chunks) > 1
        return self._schedule(
            forward_step_func=forward,
            data_iterator=iterators if several else iterators[0],
            model=cast(Any, self.chunks if several else self.chunks[0]),
            num_microbatches=len(micro_batches),
            seq_length=max(int(micro_batch.cu_seqlens[-1]) for micro_batch in micro_batches),
            micro_batch_size=1,
            **kwargs,
        )

    def _reduce(self, results: list[MicroBatchResult]) -> tuple[float, Diagnostics]:
        """Add up what the last stages saw; each token counts once."""
        totals = Diagnostics.zeros(self.parallel.device)
        loss = torch.zeros(1, dtype=torch.float64, device=self.parallel.device)
        if self.parallel.tensor_rank == 0:
            for result in results:
                loss += result.loss
                totals = totals + result.diagnostics
        # One all-gather, for sums and maxima alike.
        values = torch.cat([loss, totals.sums, totals.maxima])
        gathered = [torch.empty_like(values) for _ in range(self.parallel.world_size)]
        dist.all_gather(gathered, values)
        ranks = torch.stack(gathered)
        sums, maxima = ranks[:, : -len(totals.maxima)].sum(0), ranks[:, -len(totals.maxima) :].amax(0)
        return float(sums[0]), Diagnostics(sums=sums[1:], maxima=maxima)

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full HF-named tensors on global rank 0, bucket by bucket; nothing elsewhere."""
        return self.exporter.tensors()

    def sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """Model and optimizer as Megatron's sharded tensors, under layout-independent names."""
        model = {f"model{i}": unwrap(chunk).sharded_state_dict() for i, chunk in enumerate(self.chunks)}
        optimizer = sharded_optimizer_state(self.optimizer, model, is_loading=is_loading)
        return {**model, "optimizer": optimizer}

    def load_state(self, state: dict[str, Any], *, optimizer_step: int, num_updates: int) -> None:
        """The inverse of `sharded_state`, from the loaded tensors."""
        for i, chunk in enumerate(self.chunks):
            unwrap(chunk).load_state_dict(state[f"model{i}"])
        load_optimizer_state(self.optimizer, state["optimizer"], optimizer_step)
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
