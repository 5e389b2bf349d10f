"""Our own norm and core attention, where Transformer Engine is not installed.

Megatron's local modules cannot serve here: its torch norm refuses sequence parallelism, and its unfused
attention knows no packed sequences.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_drpo.batching.packed_attention import ContextRanks, attend_packed


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm; its weight's gradient is summed over sequence-parallel ranks by Megatron."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        device = torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  Megatron's mark

    def forward(self, x: Float[torch.Tensor, "*tokens hidden"]) -> Float[torch.Tensor, "*tokens hidden"]:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences, under context parallelism too: see `attend_packed`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale
        self.context: ContextRanks | None = None
        if config.context_parallel_size > 1 and pg_collection is not None:
            group = pg_collection.cp
            gather = functools.partial(gather_from_sequence_parallel_region, group=group)
            self.context = ContextRanks(group.rank(), group.size(), gather)

    def forward(
        self,
        query_TND: Float[torch.Tensor, "T N D"],
        key_TGD: Float[torch.Tensor, "T G D"],
        value_TGD: Float[torch.Tensor, "T G D"],
        attention_mask: None,
        attn_mask_type: object = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Float[torch.Tensor, "T ND"]:
        """All tokens of this rank: under context parallelism T / C of those that cu_seqlens describes."""
        if packed_seq_params is None:
            raise ValueError("PackedAttention takes packed sequences only: packed_seq_params is missing")
        cu_seqlens = packed_seq_params.cu_seqlens_q
        return attend_packed(query_TND, key_TGD, value_TGD, cu_seqlens, self.scale, self.context)
