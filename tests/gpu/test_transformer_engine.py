"""Transformer Engine on a GPU against its stand-in on a CPU: the same weights, inputs and gradients.

Needs a GPU and Transformer Engine. The stand-in is called by its own names, in fp32; Transformer Engine
computes in BF16, so that a difference of a few of BF16's steps is its rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_drpo.platform.te_cpu.attention import DotProductAttention
from megatron_drpo.platform.te_cpu.grouped_linear import GroupedLinear
from megatron_drpo.platform.te_cpu.linear import LayerNormLinear, Linear
from megatron_drpo.platform.te_cpu.norm import RMSNorm
from megatron_drpo.platform.te_cpu.optimizers import FusedAdam, multi_tensor_l2norm
from megatron_drpo.platform.te_cpu.permutation import (
    moe_permute_with_probs,
    moe_sort_chunks_by_index,
    moe_unpermute,
)
from megatron_drpo.platform.te_cpu.rope import apply_rotary_pos_emb
from megatron_drpo.platform.te_cpu.router import fused_topk_with_score_function

pytestmark = pytest.mark.gpu

IN, OUT, TOKENS, EXPERTS = 256, 512, 96, 4
BF16_RELATIVE_NORM = 1e-2
"""Of a tensor's difference: BF16 keeps 8 bits, 4e-3 per rounding."""


@pytest.fixture(scope="module")
def te() -> Any:
    """transformer_engine.pytorch, the real one."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return pytest.importorskip("transformer_engine.pytorch")


def values(*shape: int, seed: int = 0) -> Tensor:
    """Random fp32 numbers that BF16 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def run(layer: Callable[..., Any], x: Tensor, grad: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """Output and the input's gradient; the parameters' are in `.grad`."""
    x = x.detach().clone().requires_grad_()
    y = layer(x, *arguments)
    y.backward(grad.to(y.device, y.dtype))
    assert x.grad is not None
    return y, x.grad


OPTIONS: dict[str, Any] = {"bias": False, "params_dtype": torch.bfloat16}
LAYERS: dict[str, tuple[type[torch.nn.Module], tuple[int, ...], dict[str, Any], tuple[object, ...]]] = {
    "Linear": (Linear, (IN, OUT), OPTIONS, ()),
    "LayerNormLinear": (LayerNormLinear, (IN, OUT), {**OPTIONS, "normalization": "RMSNorm"}, ()),
    "RMSNorm": (RMSNorm, (IN,), {"params_dtype": torch.bfloat16}, ()),
    "GroupedLinear": (GroupedLinear, (EXPERTS, IN, OUT), OPTIONS, ([40, 0, 24, 32],)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(te: Any, name: str) -> None:
    kind, sizes, options, arguments = LAYERS[name]
    ours = kind(*sizes, **{**options, "params_dtype": torch.float32})
    theirs = getattr(te, name)(*sizes, **options, device="cuda")
    found, expected = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    with torch.no_grad():
        for number, (key, parameter) in enumerate(expected.items()):
            parameter.copy_(values(*parameter.shape, seed=number + 1))
            found[key].copy_(parameter)
    x, grad = values(TOKENS, IN), values(TOKENS, IN if name == "RMSNorm" else OUT, seed=9)
    wanted = run(ours, x, grad, *arguments)
    got = run(theirs, x.cuda().bfloat16(), grad, *arguments)
    for mine, other in zip(got, wanted, strict=True):
        assert relative(mine, other) < BF16_RELATIVE_NORM
    for key, parameter in expected.items():
        assert found[key].grad is not None
        if parameter.grad is not None and parameter.grad.norm() > 0:
            assert relative(found[key].grad, parameter.grad) < BF16_RELATIVE_NORM, key


def test_attention(te: Any) -> None:
    """Packed sequences, four query heads of one key and value head."""
    cu_seqlens = torch.tensor([0, 17, 18, 64, 96], dtype=torch.int32)
    shapes = ((TOKENS, 8, 64), (TOKENS, 2, 64), (TOKENS, 2, 64))
    inputs = [values(*shape, seed=number) for number, shape in enumerate(shapes)]
    grad = values(TOKENS, 8 * 64, seed=5)
    options: dict[str, Any] = {"num_gqa_groups": 2, "attn_mask_type": "padding_causal", "qkv_format": "thd"}
    results = []
    for kind, device, dtype in (
        (DotProductAttention, "cpu", torch.float32),
        (te.DotProductAttention, "cuda", torch.bfloat16),
    ):
        attention = kind(8, 64, softmax_scale=0.125, **options)
        local = [x.to(device, dtype).requires_grad_() for x in inputs]
        bounds = cu_seqlens.to(device)
        out = attention(
            *local,
            None,
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=46,
            max_seqlen_kv=46,
            attn_mask_type="padding_causal",
        )
        out.backward(grad.to(device, dtype))
        results.append([out, *(x.grad for x in local)])
    for expected, found in zip(*results, strict=True):
        assert relative(found, expected) < BF16_RELATIVE_NORM


def test_functions(te: Any) -> None:
    rope = importlib.import_module("transformer_engine.pytorch.attention.rope")
    permutation = importlib.import_module("transformer_engine.pytorch.permutation")
    router = importlib.import_module("transformer_engine.pytorch.router")
    cu_seqlens = torch.tensor([0, 40, 96], dtype=torch.int32)
    x, angles = values(TOKENS, 4, 64), values(64, 1, 1, 32).repeat(1, 1, 1, 2)
    expected = apply_rotary_pos_emb(x, angles, tensor_format="thd", cu_seqlens=cu_seqlens)
    found = rope.apply_rotary_pos_emb(
        x.cuda(), angles.cuda(), tensor_format="thd", fused=True, cu_seqlens=cu_seqlens.cuda()
    )
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)

    logits = values(TOKENS, EXPERTS)
    options: dict[str, Any] = {
        "topk": 2,
        "use_pre_softmax": False,
        "num_groups": None,
        "group_topk": None,
        "scaling_factor": None,
        "score_function": "softmax",
        "expert_bias": None,
    }
    probs, chosen = fused_topk_with_score_function(logits, **options)
    found_probs, found_chosen = router.fused_topk_with_score_function(logits.cuda(), **options)
    assert torch.equal(found_chosen.cpu(), chosen)
    torch.testing.assert_close(found_probs.cpu(), probs, rtol=1e-5, atol=1e-6)

    tokens = values(TOKENS, IN)
    rows, row_probs, ids = moe_permute_with_probs(tokens, probs, chosen, 2 * TOKENS)
    found_rows, found_row_probs, found_ids = permutation.moe_permute_with_probs(
        tokens.cuda(), probs.cuda(), chosen.cuda(), num_out_tokens=2 * TOKENS
    )
    assert torch.equal(found_rows.cpu(), rows)
    assert torch.equal(found_row_probs.cpu(), row_probs)
    back = moe_unpermute(rows, ids, restore_shape=tokens.shape)
    found_back = permutation.moe_unpermute(found_rows, found_ids, restore_shape=tokens.shape)
    torch.testing.assert_close(found_back.cpu(), back)
    sizes, order = torch.tensor([30, 0, 50, 16]), torch.tensor([3, 0, 2, 1])
    moved = permutation.moe_sort_chunks_by_index(tokens.cuda(), sizes.cuda(), order.cuda())
    assert torch.equal(moved.cpu(), moe_sort_chunks_by_index(tokens, sizes, order))


def test_optimizer(te: Any) -> None:
    optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (torch.nn.Parameter(values(IN, OUT).to(device)) for device in ("cpu", "cuda"))
    pairs = [(ours, FusedAdam([ours], **options)), (theirs, optimizers.FusedAdam([theirs], **options))]
    for step in range(3):
        for parameter, optimizer in pairs:
            parameter.grad = values(IN, OUT, seed=step + 1).to(parameter.device)
            optimizer.step()
    torch.testing.assert_close(theirs.detach().cpu(), ours.detach(), rtol=1e-5, atol=1e-6)
    tensors = [values(IN, OUT, seed=seed) for seed in range(3)]
    expected, _ = multi_tensor_l2norm(0, torch.zeros(1), [tensors])
    flag = torch.zeros(1, dtype=torch.int, device="cuda")
    found, _ = optimizers.multi_tensor_applier(
        optimizers.multi_tensor_l2norm, flag, [[tensor.cuda() for tensor in tensors]], False
    )
    torch.testing.assert_close(found.cpu().reshape(1), expected, rtol=1e-6, atol=0)
