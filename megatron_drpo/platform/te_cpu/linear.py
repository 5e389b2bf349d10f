"""Linear layers with tensor and sequence parallelism, alone and behind a norm.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/module/linear.py
https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/module/layernorm_linear.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_drpo.platform.te_cpu.base import (
    TransformerEngineBaseModule,
    mark_parallel,
    new_weight,
)
from megatron_drpo.platform.te_cpu.gemm import multiply
from megatron_drpo.platform.te_cpu.norm import new_norm_weight, refuse_layer_norm, rms_norm


class Linear(TransformerEngineBaseModule):
    """y = x W^T + b. The arguments are the whole layer's features, the attributes this rank's."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_method: Callable[..., object] | None = None,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.in_features, self.out_features = self.local_features(in_features, out_features)
        self.weight = new_weight(self.out_features, self.in_features, params_dtype, init_method)
        mark_parallel(self.weight, 1 if self.parallel_mode == "row" else 0)
        self.use_bias = bias
        self.bias = Parameter(torch.zeros(self.out_features, dtype=params_dtype)) if bias else None
        if self.bias is not None and self.parallel_mode == "column":
            mark_parallel(self.bias, 0)
        elif self.bias is not None and self.parallel_mode == "row":
            setattr(self.bias, "sequence_parallel", self.sequence_parallel)  # noqa: B010  Megatron's mark
        self.save_original_input = False  # Megatron sets it; the input is kept anyway

    def forward(
        self, x: Tensor, is_first_microbatch: bool | None = None, **_: object
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """[..., out_features]; with `return_bias` the bias comes beside it, not yet added."""
        y = self.leave(multiply(self.enter(x), self.weight, self.fuse_wgrad_accumulation))
        if self.return_bias:
            return y, self.bias
        return y if self.bias is None else y + self.bias


class LayerNormLinear(Linear):
    """RMSNorm, then Linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        return_layernorm_output: bool = False,
        params_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **options)
        if normalization != "RMSNorm":
            refuse_layer_norm()
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.layer_norm_weight = new_norm_weight(
            in_features,
            params_dtype,
            zero_centered_gamma=zero_centered_gamma,
            sequence_parallel=self.sequence_parallel,
        )

    def forward(
        self, x: Tensor, is_first_microbatch: bool | None = None, **_: object
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """See Linear."""
        return super().forward(
            rms_norm(x, self.layer_norm_weight, self.eps, zero_centered_gamma=self.zero_centered_gamma)
        )
