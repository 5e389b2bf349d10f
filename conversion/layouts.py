"""Parallel layouts as words: `tp2pp2ep2`."""

from __future__ import annotations

import re
from typing import Any

from megatron_drpo.config.schema import ParallelConfig
from megatron_drpo.errors import ConversionError

_AXES = {
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "vpp": "virtual_pipeline_parallel_size",
    "ep": "expert_parallel_size",
    "dp": "data_parallel_size",
}


def parse_layout(text: str, *, is_moe: bool) -> ParallelConfig:
    """`tp2pp2ep2` and the like; what follows from it is filled in.

    Raises:
        ConversionError: it is none.
    """
    if not re.fullmatch(r"((tp|pp|vpp|ep|dp)\d+)+", text):
        raise ConversionError(
            f"{text!r} is no layout: expected sizes of {', '.join(_AXES)}, such as tp2, pp2 or tp2pp2ep2"
        )
    sizes: dict[str, Any] = {
        _AXES[axis]: int(size) for axis, size in re.findall(r"(tp|vpp|pp|ep|dp)(\d+)", text)
    }
    tensor, expert = sizes.get("tensor_parallel_size", 1), sizes.get("expert_parallel_size", 1)
    if expert > tensor:  # experts are spread over tensor- and data-parallel ranks
        sizes["data_parallel_size"] = max(sizes.get("data_parallel_size", 1), -(-expert // tensor))
    if is_moe and expert == 1:
        sizes["expert_tensor_parallel_size"] = tensor
    return ParallelConfig(sequence_parallel=is_moe and tensor > 1, **sizes)
