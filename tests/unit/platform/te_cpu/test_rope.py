"""Rotary embedding against Megatron's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.te_cpu.rope import apply_rotary_pos_emb


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (3, 4)])
def test_rotary_embedding_of_packed_sequences(rank: int, size: int) -> None:
    cu_seqlens = torch.tensor([0, 16, 16, 24, 56], dtype=torch.int32)
    x = values(56 // size, 2, 10)
    angles = values(40, 1, 1, 3).repeat(1, 1, 1, 2)
    found = apply_rotary_pos_emb(
        x, angles, tensor_format="thd", fused=True, cu_seqlens=cu_seqlens, cp_size=size, cp_rank=rank
    )
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    expected = rope_utils._apply_rotary_pos_emb_thd(x, cu_seqlens, angles, cp_group=group)
    torch.testing.assert_close(found, expected)


def test_rotary_embedding_of_a_batch() -> None:
    x, angles = values(9, 3, 2, 6), values(12, 1, 1, 3).repeat(1, 1, 1, 2)
    found = apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True)
    torch.testing.assert_close(found, rope_utils._apply_rotary_pos_emb_bshd(x, angles[:9]))
    with pytest.raises(PlatformError, match="turns halves only"):
        apply_rotary_pos_emb(x, angles, interleaved=True)


def test_rotary_embedding_rounds_once() -> None:
    x, angles = values(9, 1, 2, 6).bfloat16(), 100 * values(9, 1, 1, 3).repeat(1, 1, 1, 2)
    found = apply_rotary_pos_emb(x, angles, tensor_format="sbhd")
    exact = apply_rotary_pos_emb(x.float(), angles, tensor_format="sbhd")
    assert torch.equal(found, exact.bfloat16())
