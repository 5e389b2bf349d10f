"""Our own norm and core attention, where Transformer Engine is not installed.

Megatron's local modules cannot serve here: its torch norm refuses sequence parallelism, and its unfused
attention knows no packed sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig


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
    """Causal attention over packed sequences (THD) with torch's scaled_dot_product_attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

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
        if packed_seq_params is None:
            raise ValueError("PackedAttention takes packed sequences only: packed_seq_params is missing")
        repeats = query_TND.shape[1] // key_TGD.shape[1]
        key_TND = key_TGD.repeat_interleave(repeats, dim=1)
        value_TND = value_TGD.repeat_interleave(repeats, dim=1)
        pieces: list[torch.Tensor] = []
        positions: list[torch.Tensor] = []
        for index_SL, valid_SL in _length_buckets(packed_seq_params.cu_seqlens_q.tolist(), query_TND.device):
            q, k, v = (x[index_SL].transpose(1, 2) for x in (query_TND, key_TND, value_TND))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale).transpose(1, 2)
            pieces.append(out[valid_SL])
            positions.append(index_SL[valid_SL])
        output_TND = torch.cat(pieces)[torch.cat(positions).argsort()]
        return output_TND.flatten(1)


def _length_buckets(
    cu_seqlens: list[int], device: torch.device
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Group sequences whose lengths round up to the same power of two, right-padded to the longest.

    Under a causal mask padding on the right changes nothing, so each group is one attention call.

    Yields:
        (index_SL int64, valid_SL bool): packed position of each token, and which entries are tokens.
    """
    buckets: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(cu_seqlens):
        if end > start:
            buckets.setdefault((end - start - 1).bit_length(), []).append((start, end))
    for spans in buckets.values():
        starts = torch.tensor([start for start, _ in spans], device=device)
        lengths = torch.tensor([end - start for start, end in spans], device=device)
        offsets = torch.arange(int(lengths.max()), device=device)
        valid_SL = offsets < lengths[:, None]
        yield torch.where(valid_SL, starts[:, None] + offsets, starts[:, None]), valid_SL
