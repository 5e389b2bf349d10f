"""What the modules share: Megatron's marks on parameters, tensor parallelism, and the extra state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron_drpo.platform.te_cpu.communication import (
    copy_to_ranks,
    gather_tokens,
    reduce_from_ranks,
    scatter_tokens,
)

ParallelMode = Literal["column", "row"] | None


class TransformerEngineBaseModule(torch.nn.Module):
    """A layer whose weights may be cut over the ranks of a tensor-parallel group.

    Under sequence parallelism a column-parallel layer gathers its tokens and a row-parallel one scatters
    them; otherwise their input's gradient and their output are summed over the ranks.
    """

    def __init__(
        self,
        *,
        parallel_mode: ParallelMode = None,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        return_bias: bool = False,
        **_: object,
    ) -> None:
        """
        Args:
            parallel_mode: how the weight is cut; None: every rank has all of it.
            fuse_wgrad_accumulation: weight gradients go straight into `main_grad`.
            return_bias: a bias is returned beside the output, not added.
            _: what Transformer Engine takes besides and a CPU has no use for.
        """
        super().__init__()
        self.parallel_mode = parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.tp_group = tp_group
        self.tp_size = tp_size
        self.return_bias = return_bias
        # Megatron reads these before it saves or loads.
        self.fp8 = False
        self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}

    def set_tensor_parallel_group(self, tp_group: dist.ProcessGroup | None) -> None:
        self.tp_group = tp_group

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        return None

    def get_extra_state(self) -> Tensor:
        """FP8 has none: an empty byte tensor, as Transformer Engine saves it."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        return None

    def local_features(self, in_features: int, out_features: int) -> tuple[int, int]:
        """This rank's."""
        if self.parallel_mode == "column":
            return in_features, out_features // self.tp_size
        if self.parallel_mode == "row":
            return in_features // self.tp_size, out_features
        return in_features, out_features

    def enter(self, x: Tensor) -> Tensor:
        """The input that this rank's part of the weight is applied to."""
        if self.tp_group is None or self.tp_size == 1 or self.parallel_mode != "column":
            return x
        return (gather_tokens if self.sequence_parallel else copy_to_ranks)(x, self.tp_group)

    def leave(self, y: Tensor) -> Tensor:
        """The output that the next layer gets."""
        if self.tp_group is None or self.tp_size == 1 or self.parallel_mode != "row":
            return y
        return (scatter_tokens if self.sequence_parallel else reduce_from_ranks)(y, self.tp_group)


def new_weight(
    out_features: int, in_features: int, dtype: torch.dtype | None, init_method: Callable[..., object] | None
) -> Parameter:
    """[out_features, in_features], initialised by Megatron's method."""
    weight = Parameter(torch.empty(out_features, in_features, dtype=dtype))
    if init_method is not None:
        with torch.no_grad():
            init_method(weight)
    return weight


def mark_parallel(parameter: Parameter, dim: int) -> None:
    """Megatron's marks for a parameter of which every tensor-parallel rank holds a part of its own."""
    for name, value in (("tensor_model_parallel", True), ("partition_dim", dim), ("partition_stride", 1)):
        setattr(parameter, name, value)
