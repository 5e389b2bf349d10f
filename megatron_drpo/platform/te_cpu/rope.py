"""Rotary position embedding in one call.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/attention/rope.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_drpo.batching.context_parallel import local_positions
from megatron_drpo.errors import PlatformError


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    *,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
    **_: object,
) -> Tensor:
    """The first `freqs.shape[-1]` features of each head, turned in fp32 and rounded once.

    Args:
        t: [T, N, D] ("thd") of a rank's tokens, or [L, B, N, D] ("sbhd").
        freqs: [positions, 1, 1, R], angles in radians, the second half of R as the first.
        cu_seqlens: [S + 1] of the whole sequences ("thd"), each cut over `cp_size` ranks.
    """
    if interleaved:
        raise PlatformError("rotary_interleaved: the CPU stand-in for Transformer Engine turns halves only")
    if tensor_format == "thd":
        assert cu_seqlens is not None
        angles = freqs[_positions(cu_seqlens, cp_rank, cp_size)].flatten(1, 2)
    elif tensor_format == "sbhd":
        angles = freqs[: len(t)]
    else:
        raise PlatformError(f"rotary embedding of format {tensor_format}: sbhd and thd there are")
    turned, rest = t.split([freqs.shape[-1], t.shape[-1] - freqs.shape[-1]], dim=-1)
    x = turned.float()
    front, back = x.chunk(2, dim=-1)
    out = x * angles.float().cos() + torch.cat([-back, front], dim=-1) * angles.float().sin()
    return torch.cat([out.to(t.dtype), rest], dim=-1)


def _positions(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Of each of the rank's tokens, within its sequence."""
    total = int(cu_seqlens[-1])
    packed = torch.arange(total) if size == 1 else local_positions(cu_seqlens, rank, size)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens.long(), packed, right=True) - 1]
    return packed - starts
