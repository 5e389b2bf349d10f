"""Where Megatron-Core and Transformer Engine do not fit together as released, and what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import megatron.core.tensor_parallel.layers as megatron_layers
import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import TEGroupedMLP


@contextmanager
def output_layer_without_apex() -> Iterator[None]:
    """Megatron can build an output layer inside though weight gradients are fused and apex is not installed.

    `ColumnParallelLinear` refuses `gradient_accumulation_fusion` without apex's extension, which Transformer
    Engine's layers do not need. The policy's output layer is a weight and never called: the logprob op adds
    its gradient itself. A layer of this class that is called without the extension still fails, by name.
    https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/tensor_parallel/layers.py#L924
    """
    available = megatron_layers._grad_accum_fusion_available
    megatron_layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        megatron_layers._grad_accum_fusion_available = available


def mark_expert_weights(model: torch.nn.Module) -> None:
    """Mark grouped experts' weights as cut over tensor-parallel ranks, as Megatron's own experts are.

    A parameter without the mark counts as the same on all tensor-parallel ranks, and only the first rank's
    gradient enters the global norm. Transformer Engine set it up to 2.12, megatron-core does since 0.19.
    https://github.com/NVIDIA/Megatron-LM/issues/5916
    """
    for module in model.modules():
        if not isinstance(module, TEGroupedMLP):
            continue
        linears = cast("list[torch.nn.Module]", [module.linear_fc1, module.linear_fc2])
        for dim, linear in enumerate(linears):  # the first is cut by its output, the second by its input
            for parameter in linear.parameters():
                if not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, True, dim, 1)
