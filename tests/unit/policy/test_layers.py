"""Norm and attention of the local layer spec against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_drpo.batching.context_parallel import local_positions
from megatron_drpo.config.schema import PlatformName
from megatron_drpo.platform.base import Platform, build_platform
from megatron_drpo.policy.layers import PackedAttention, RMSNorm


def make_config(*, sequence_parallel: bool = False, context_size: int = 1) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
        context_parallel_size=context_size,
        params_dtype=torch.float32,
    )


@pytest.mark.parametrize("shape", [(5, 1, 24), (3, 2, 4, 24)])
def test_rms_norm_and_its_gradients(cpu_platform: Platform, shape: tuple[int, ...]) -> None:
    norm = RMSNorm(make_config(), 24, eps=0.1)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = (3 * torch.randn(shape)).requires_grad_()
    gradient = torch.randn(shape)
    norm(x).backward(gradient)

    reference_x = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    expected = weight * reference_x / (reference_x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    expected.backward(gradient.double())
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert x.grad is not None
    assert norm.weight.grad is not None
    torch.testing.assert_close(x.grad.double(), reference_x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_rms_norm_is_marked_for_megatrons_gradient_sum(
    cpu_platform: Platform, sequence_parallel: bool
) -> None:
    """finalize_model_grads sums the gradients of exactly the parameters with this mark over the TP group."""
    norm = RMSNorm(make_config(sequence_parallel=sequence_parallel), 24)
    assert vars(norm.weight)["sequence_parallel"] is sequence_parallel


def attend_densely(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[L, N, D] of one sequence, by the definition."""
    repeats = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        group = head // repeats
        scores = query[:, head] @ key[:, group].T * scale
        length = len(scores)
        future = torch.ones(length, length).triu(1).bool()
        heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, group])
    return torch.stack(heads, dim=1)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [5, 1, 12, 16, 17, 2, 3, 1, 9, 33], [4, 4, 4]])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_packed_attention_and_its_gradients(
    cpu_platform: Platform, lengths: list[int], num_groups: int, scale: float | None
) -> None:
    attention = PackedAttention(make_config(), 1, AttnMaskType.causal, "self", softmax_scale=scale)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    total = sum(lengths)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    torch.manual_seed(0)
    inputs = [torch.randn(total, heads, 6, requires_grad=True) for heads in (4, num_groups, num_groups)]
    gradient = torch.randn(total, 24)
    output = attention(*inputs, None, packed_seq_params=packed)
    output.backward(gradient)

    references = q, k, v = [x.detach().double().requires_grad_() for x in inputs]
    spans = [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
    expected = torch.cat(
        [attend_densely(q[span], k[span], v[span], scale or 6**-0.5) for span in spans]
    ).flatten(1)
    expected.backward(gradient.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    for x, reference in zip(inputs, references, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


def test_empty_sequences_are_passed_over(cpu_platform: Platform) -> None:
    attention = PackedAttention(make_config(), 1, AttnMaskType.causal, "self")
    query, key, value = torch.randn(3, 5, 4, 6).unbind(0)
    outputs = []
    for bounds in ([0, 2, 5], [0, 0, 2, 2, 5, 5]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
        outputs.append(attention(query, key, value, None, packed_seq_params=packed))
    assert torch.equal(*outputs)


def test_unpacked_sequences_are_refused(cpu_platform: Platform) -> None:
    attention = PackedAttention(make_config(), 1, AttnMaskType.causal, "self")
    query = torch.randn(5, 4, 6)
    with pytest.raises(ValueError, match="packed_seq_params is missing"):
        attention(query, query, query, None)


CONTEXT_LENGTHS = [24, 8, 8, 40, 16, 0, 120, 32]


def _attention_inputs(num_groups: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Query, key, value of all packed tokens, the output's gradient, and the bounds."""
    cu_seqlens = torch.tensor([0, *CONTEXT_LENGTHS]).cumsum(0, dtype=torch.int32)
    total = int(cu_seqlens[-1])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(total, heads, 6, generator=generator) for heads in (4, num_groups, num_groups)]
    return inputs, torch.randn(total, 24, generator=generator), cu_seqlens


def _attend_on_one_rank(num_groups: int) -> list[Tensor]:
    """Output of this rank's tokens, and the gradients of their query, key and value."""
    rank, size = dist.get_rank(), dist.get_world_size()
    build_platform(PlatformName.cpu).prepare(rank)
    groups = ProcessGroupCollection()
    groups.cp = cast(dist.ProcessGroup, dist.group.WORLD)
    attention = PackedAttention(
        make_config(context_size=size),
        1,
        AttnMaskType.causal,
        "self",
        softmax_scale=0.7,
        pg_collection=groups,
    )
    inputs, gradient, cu_seqlens = _attention_inputs(num_groups)
    positions = local_positions(cu_seqlens, rank, size)
    local = [x[positions].requires_grad_() for x in inputs]
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    output = attention(*local, None, packed_seq_params=packed)
    output.backward(gradient[positions])
    gradients = [x.grad for x in local if x.grad is not None]
    return [output.detach(), *gradients]


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "num_groups"), [(2, 2), (4, 1), (4, 4)])
def test_context_ranks_attend_to_whole_sequences(
    run_distributed: Callable[..., list[Any]], size: int, num_groups: int
) -> None:
    """Keys and values of the other ranks at their true positions, and their gradients summed over ranks."""
    inputs, gradient, cu_seqlens = _attention_inputs(num_groups)
    references = q, k, v = [x.double().requires_grad_() for x in inputs]
    spans = [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist()) if stop > start]
    expected = torch.cat([attend_densely(q[span], k[span], v[span], 0.7) for span in spans]).flatten(1)
    expected.backward(gradient.double())

    ranks = run_distributed(_attend_on_one_rank, size, num_groups)
    wanted = [expected, *(reference.grad for reference in references if reference.grad is not None)]
    for found, reference in zip(zip(*ranks, strict=True), wanted, strict=True):
        whole = torch.empty_like(reference)
        for rank, piece in enumerate(found):
            whole[local_positions(cu_seqlens, rank, size)] = piece.double()
        torch.testing.assert_close(whole, reference, rtol=1e-5, atol=1e-5)


class _Group:
    """The part of a process group that the rotary embedding asks."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lengths", [[24, 8, 40], [16]])
def test_rotary_embedding_turns_by_true_positions(
    cpu_platform: Platform, size: int, lengths: list[int]
) -> None:
    """Megatron splits packed sequences into the same parts as we do; against complex rotation in float64."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    query = torch.randn(sum(lengths), 4, 6)
    rope = RotaryEmbedding(
        6, rotary_percent=1.0, use_cpu_initialization=True, cp_group=cast(Any, _Group(0, 1))
    )
    freqs = rope(max(lengths), packed_seq=True)
    position = torch.cat([torch.arange(length) for length in lengths]).double()
    angle = position[:, None, None] * 10000.0 ** (-torch.arange(3).double() / 3)
    turned = torch.complex(*query.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    for rank in range(size):
        positions = local_positions(cu_seqlens, rank, size)
        group = cast(Any, _Group(rank, size))
        found = apply_rotary_pos_emb(query[positions], freqs, make_config(), cu_seqlens, cp_group=group)
        torch.testing.assert_close(found.double(), expected[positions], rtol=1e-5, atol=1e-5)
