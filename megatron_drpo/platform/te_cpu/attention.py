"""Attention over packed sequences, with context parallelism.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.batching.packed_attention import ContextRanks, attend_packed
from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.te_cpu.communication import gather_tokens


class DotProductAttention(torch.nn.Module):
    """Causal attention over sequences in the "thd" format, without dropout."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        softmax_scale: float | None = None,
        cp_group: dist.ProcessGroup | None = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: object = None,
        cp_comm_type: str = "p2p",
        **_: object,
    ) -> None:
        super().__init__()
        if attention_dropout:
            raise PlatformError(
                f"attention_dropout={attention_dropout}: Transformer Engine's CPU stand-in has no dropout"
            )
        self.softmax_scale = softmax_scale
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)

    def set_context_parallel_group(
        self,
        cp_group: dist.ProcessGroup | None,
        cp_global_ranks: list[int] | None,
        cp_stream: object,
        cp_comm_type: str = "p2p",
    ) -> None:
        """The ranks that share each sequence, two parts each; None: every rank has whole sequences."""
        self.cp_group = cp_group
        self.cp_comm_type = cp_comm_type

    def forward(
        self,
        query_TND: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        attn_mask_type: str = "causal",
        **_: object,
    ) -> Tensor:
        """[T, N * D], in the order of the queries.

        Args:
            cu_seqlens_q: [S + 1], of the whole sequences.
        """
        if qkv_format != "thd" or attn_mask_type != "padding_causal" or cu_seqlens_q is None:
            raise PlatformError(
                f"attention of format {qkv_format} and mask {attn_mask_type}: on a CPU, Transformer Engine's "
                f"stand-in has causal attention over packed sequences only (thd, padding_causal)"
            )
        context = None
        if self.cp_group is not None and self.cp_group.size() > 1:
            gather = functools.partial(gather_tokens, group=self.cp_group)
            context = ContextRanks(self.cp_group.rank(), self.cp_group.size(), gather)
        return attend_packed(query_TND, key_TGD, value_TGD, cu_seqlens_q, self.softmax_scale, context)
