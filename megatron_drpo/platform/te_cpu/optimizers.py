"""Transformer Engine's optimizers and multi-tensor functions, by torch's own.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/optimizers/fused_adam.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_drpo.errors import PlatformError

FusedSGD = torch.optim.SGD


class FusedAdam(torch.optim.Optimizer):
    """Adam, decoupled weight decay by default. It counts steps per group, not per parameter as torch does."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        master_weights: bool = False,
        **_: object,
    ) -> None:
        if amsgrad or master_weights or not bias_correction:
            raise PlatformError(
                "Transformer Engine's CPU stand-in has plain Adam only: no amsgrad, no master weights of its "
                "own (use_precision_aware_optimizer), no Adam without bias correction"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._update = adamw if adam_w_mode else adam

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            beta1, beta2 = group["betas"]
            self._update(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(group["step"] - 1.0) for _ in parameters],  # counted up before it is used
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


_CHUNK = 2048 * 32
"""Elements that one block of threads works on: an argument of every multi-tensor function."""


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> Any:
    """`op` over lists of tensors."""
    return op(_CHUNK, noop_flag, tensor_lists, *args)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together, [1] in fp32, and that of each (empty unless `per_tensor`)."""
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else torch.empty(0)


def multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> None:
    """The second list becomes the first times `scale`; the flag is set to 1 where one is not finite."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
        if not target.isfinite().all():
            noop_flag.fill_(1)
