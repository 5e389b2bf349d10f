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

from megatron_drpo.config import Dtype, OptimizerConfig, Schedule


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
) -> list[dict[int, Any]]:
    """Main parameters and both moments, each keyed `optimizer.state.<which>.<global parameter name>`.

    Global names make the state independent of the layout: how many optimizers are chained (Megatron prefixes
    their keys with an index, so that EP > 1 and EP = 1 could not read each other) does not show in it.
    `model_state` is the sharded state dict of the bare model, its parameters as data.
    """
    states: list[dict[int, Any]] = []
    for part in distributed_optimizers(optimizer):
        if is_loading or not part.optimizer.state:
            _create_state(part)
        state = part.sharded_param_state_fully_reshardable(model_state, is_loading, metadata={})
        states.append(cast(dict[int, Any], state))
    return states


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
def load_optimizer_state(optimizer: MegatronOptimizer, states: list[dict[int, Any]], step: int) -> None:
    """Put loaded state back, in place.

    torch's AdamW keeps `step` beside each parameter's moments. Megatron's loader would copy it from a state
    that does not hold it, and shares one tensor among all parameters, which then counts once per
    parameter: it is taken out before, and put back as one tensor per parameter.
    """
    for part, state in zip(distributed_optimizers(optimizer), states, strict=True):
        torch_states = part.optimizer.state.values()
        with_step = [entry for entry in torch_states if "step" in entry]
        for entry in with_step:
            del entry["step"]
        part.load_parameter_state_from_fully_reshardable(state)
        for entry in with_step:
            entry["step"] = torch.tensor(float(step))
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = step
