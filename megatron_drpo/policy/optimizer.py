"""AdamW with Megatron's distributed optimizer: construction, learning rate, and its state for checkpoints."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer import MegatronModule

from megatron_drpo.config.schema import Dtype, OptimizerConfig, Schedule
from megatron_drpo.policy.optimizer_state import restore_state, save_state, wanted_state


def build_optimizer(
    config: OptimizerConfig, dtype: Dtype, chunks: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """Main parameters, gradients and both moments in fp32, sharded over data-parallel ranks.

    Vectors (the norms' weights) have no weight decay.
    """
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad or 0.0,  # Megatron's word for no limit
        bf16=dtype is Dtype.bf16,
        params_dtype=torch.bfloat16 if dtype is Dtype.bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    modules = cast(list[MegatronModule], chunks)
    optimizer = get_megatron_optimizer(megatron_config, modules, use_gloo_process_groups=False)
    for group in optimizer.param_groups:  # Megatron leaves this to its scheduler, which is not used here
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer


def compute_learning_rate(config: OptimizerConfig, update: int, num_updates: int) -> float:
    """The learning rate of optimizer step `update` (from 0) of `num_updates`.

    Linear warm-up from lr / num_warmup_updates, then constant, or linear / cosine down to min_lr at the end.
    """
    warmup = config.num_warmup_updates
    if update < warmup:
        return config.lr * (update + 1) / warmup
    if config.schedule is Schedule.constant:
        return config.lr
    progress = min(1.0, (update - warmup) / max(1, num_updates - warmup))
    if config.schedule is Schedule.linear:
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set it for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def compute_gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global norm of the accumulated gradients, the same on every rank; inf or nan if one is not finite."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def apply_gradients(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip by the norm from `compute_gradient_norm`, then step: the second half of Megatron's `step`, so that
    a gradient that is not finite never reaches the weights."""
    clip_grad = optimizer.config.clip_grad
    for part in distributed_optimizers(optimizer):
        parameters = part.get_parameters()
        if parameters and clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                cast(list[torch.Tensor], parameters), max_norm=clip_grad, total_norm=grad_norm
            )
    optimizer.step_with_ready_grads()


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The parts of the optimizer: one for dense parameters, one for experts with ranks of their own."""
    is_chained = isinstance(optimizer, ChainedOptimizer)
    parts = optimizer.chained_optimizers if is_chained else [optimizer]
    return cast(list[DistributedOptimizer], parts)


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Collective. Main parameters and both moments, keyed `optimizer.state.<which>.<global parameter name>`:
    for saving those that this rank saves, for loading those that it reads, see `optimizer_state.py`.

    Global names make the state independent of the layout: how many optimizers are chained (Megatron prefixes
    their keys with an index, so that EP > 1 and EP = 1 could not read each other) does not show in it.
    `model_state` is the sharded state dict of the bare model, its parameters as data.
    """
    parts = distributed_optimizers(optimizer)
    for part in parts:
        if is_loading or not part.optimizer.state:
            _create_state(part)
    return wanted_state(parts, model_state) if is_loading else save_state(parts, model_state)


def _create_state(part: DistributedOptimizer) -> None:
    """Give an optimizer that has made no step its moments, of zeros.

    Megatron makes a step without gradients for that, which would decay the weights and be counted.
    """
    groups = part.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    part._init_optimizer_states_with_dummy_values()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        if "step" in group:
            group["step"] = 0
    for state in part.optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


def optimizer_step_count(optimizer: MegatronOptimizer) -> int:
    """Adam's step number (0 before the first)."""
    for part in distributed_optimizers(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
        for state in part.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
    return 0


@torch.no_grad()
def load_optimizer_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], loaded: dict[str, Any], step: int
) -> None:
    """Collective. Put loaded state back, in place; `loaded` is emptied.

    torch's AdamW keeps `step` beside each parameter's moments, as a tensor per parameter.
    """
    parts = distributed_optimizers(optimizer)
    restore_state(parts, model_state, loaded)
    for part in parts:
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(step))
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = step
