"""Norm and attention of the local layer spec against float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_drpo.platform import Platform
from megatron_drpo.policy.layers import PackedAttention, RMSNorm


def make_config(*, sequence_parallel: bool = False) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
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
