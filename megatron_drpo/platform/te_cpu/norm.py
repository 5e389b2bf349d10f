"""RMSNorm, alone and as the first half of LayerNormLinear."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron_drpo.errors import PlatformError


def new_norm_weight(
    hidden_size: int, dtype: torch.dtype | None, *, zero_centered_gamma: bool, sequence_parallel: bool
) -> Parameter:
    """[hidden_size]; Megatron sums its gradient over ranks where each sees a part of the tokens."""
    fill = torch.zeros if zero_centered_gamma else torch.ones
    weight = Parameter(fill(hidden_size, dtype=dtype))
    setattr(weight, "sequence_parallel", sequence_parallel)  # noqa: B010  Megatron's mark
    return weight


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, *, zero_centered_gamma: bool) -> Tensor:
    """`x` [..., H] over its root mean square, by the weight (by 1 + weight if it is centered at zero)."""
    scale_H = 1 + weight_H if zero_centered_gamma else weight_H
    return F.rms_norm(x, (x.shape[-1],), scale_H, eps)


class RMSNorm(torch.nn.Module):
    """https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/module/rmsnorm.py"""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **_: object,
    ) -> None:
        """
        Args:
            normalized_shape: features; `hidden_size` is its older name.
        """
        super().__init__()
        features = hidden_size if normalized_shape is None else normalized_shape
        assert features is not None
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.weight = new_norm_weight(
            features,
            params_dtype,
            zero_centered_gamma=zero_centered_gamma,
            sequence_parallel=sequence_parallel,
        )

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, zero_centered_gamma=self.zero_centered_gamma)


class LayerNorm(torch.nn.Module):
    """Named by Megatron; no family here has one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        refuse_layer_norm()


def refuse_layer_norm() -> NoReturn:
    """The one normalization there is, is RMSNorm."""
    raise PlatformError("the CPU stand-in for Transformer Engine has RMSNorm only, not LayerNorm")
