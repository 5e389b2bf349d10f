"""One linear layer per expert, each for its own rows.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/module/grouped_linear.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_drpo.platform.te_cpu import version
from megatron_drpo.platform.te_cpu.base import (
    TransformerEngineBaseModule,
    mark_parallel,
    new_weight,
)
from megatron_drpo.platform.te_cpu.gemm import multiply


class GroupedLinear(TransformerEngineBaseModule):
    """Weights `weight0` .. `weight{num_gemms - 1}`, biases `bias0` .. likewise."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        init_method: Callable[..., object] | None = None,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.num_gemms = num_gemms
        self.use_bias = bias
        self.save_original_input = False
        self.in_features, self.out_features = self.local_features(in_features, out_features)
        for index in range(num_gemms):
            weight = new_weight(self.out_features, self.in_features, params_dtype, init_method)
            if version.MARKS_EXPERT_WEIGHTS:
                mark_parallel(weight, 1 if self.parallel_mode == "row" else 0)
            self.register_parameter(f"weight{index}", weight)
            if bias:
                self.register_parameter(
                    f"bias{index}", Parameter(torch.zeros(self.out_features, dtype=params_dtype))
                )

    def forward(
        self, x_RI: Tensor, m_splits: list[int] | Tensor, is_first_microbatch: bool | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """[R, out_features] of rows that stand expert by expert.

        Args:
            m_splits: how many rows each expert has.
        """
        splits = [int(split) for split in m_splits]
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        outputs = [
            multiply(rows_XI, weight, self.fuse_wgrad_accumulation)
            for rows_XI, weight in zip(x_RI.split(splits), weights, strict=True)
        ]
        if not self.use_bias:
            return torch.cat(outputs)
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)]
        if self.return_bias:
            return torch.cat(outputs), biases
        return torch.cat([output + bias for output, bias in zip(outputs, biases, strict=True)])
