"""Linear, LayerNormLinear and GroupedLinear against float64, on one rank and cut over two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.te_cpu.gemm import general_gemm
from megatron_drpo.platform.te_cpu.grouped_linear import GroupedLinear
from megatron_drpo.platform.te_cpu.linear import LayerNormLinear, Linear
from megatron_drpo.platform.te_cpu.norm import LayerNorm, RMSNorm

IN, OUT, TOKENS = 6, 8, 4


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def set_values(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(values(*parameter.shape, seed=number + 10))


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def test_linear_is_the_product() -> None:
    layer = Linear(IN, OUT, bias=True)
    set_values(layer)
    x = values(TOKENS, 1, IN).requires_grad_()
    y = layer(x)
    y.backward(values(*y.shape, seed=1))
    assert layer.bias is not None
    x64, weight, bias = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    expected = x64 @ weight.T + bias
    expected.backward(values(*y.shape, seed=1).double())
    gradients = [(x.grad, x64.grad), (layer.weight.grad, weight.grad), (layer.bias.grad, bias.grad)]
    for found, wanted in [(y, expected), *gradients]:
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_that_is_returned_is_not_added() -> None:
    layer = Linear(IN, OUT, return_bias=True)
    set_values(layer)
    y, bias = layer(values(TOKENS, IN))
    torch.testing.assert_close(y, values(TOKENS, IN) @ layer.weight.T)
    assert bias is layer.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_gradient_is_added_to_main_grad_alone(dtype: torch.dtype) -> None:
    """In fp32, of inputs of either dtype; Megatron's DDP is told, and autograd gets something to drop."""
    layer = Linear(IN, OUT, bias=False, fuse_wgrad_accumulation=True, params_dtype=dtype)
    set_values(layer)
    weight = cast(Any, layer.weight)
    weight.main_grad = torch.ones(OUT, IN)
    weight.grad_added_to_main_grad = False
    x, grad = values(TOKENS, IN).to(dtype).requires_grad_(), values(TOKENS, OUT, seed=1).to(dtype)
    layer(x).backward(grad)
    expected = 1 + grad.double().T @ x.detach().double()
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=1e-6, atol=1e-6)
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape


def test_a_frozen_weight_gets_no_gradient() -> None:
    layer = Linear(IN, OUT, bias=False, fuse_wgrad_accumulation=True)
    set_values(layer)
    layer.weight.requires_grad_(False)
    x = values(TOKENS, IN).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(TOKENS, IN))


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norm_then_linear(zero_centered: bool) -> None:
    layer = LayerNormLinear(
        IN, OUT, eps=1e-2, normalization="RMSNorm", zero_centered_gamma=zero_centered, bias=False
    )
    norm = RMSNorm(IN, eps=1e-2, zero_centered_gamma=zero_centered)
    set_values(layer)
    with torch.no_grad():
        norm.weight.copy_(layer.layer_norm_weight)
    x = values(TOKENS, IN)
    scale = layer.layer_norm_weight.double() + (1 if zero_centered else 0)
    normed = norm_reference(x.double(), scale, 1e-2)
    torch.testing.assert_close(norm(x).double(), normed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x).double(), normed @ layer.weight.double().T, rtol=1e-5, atol=1e-5)


def test_there_is_no_layer_norm() -> None:
    for build in (lambda: LayerNorm(IN), lambda: LayerNormLinear(IN, OUT)):
        with pytest.raises(PlatformError, match="RMSNorm only"):
            build()


def test_each_expert_has_its_own_rows() -> None:
    layer = GroupedLinear(3, IN, OUT, bias=True)
    set_values(layer)
    x = values(7, IN)
    splits = [4, 0, 3]
    found = layer(x, splits)
    rows = [
        part @ getattr(layer, f"weight{index}").T + getattr(layer, f"bias{index}")
        for index, part in enumerate(x.split(splits))
    ]
    torch.testing.assert_close(found, torch.cat(rows))
    torch.testing.assert_close(layer(x, torch.tensor(splits)), found)


def test_an_expert_without_rows_gets_a_gradient_of_zero() -> None:
    layer = GroupedLinear(2, IN, OUT, bias=False, fuse_wgrad_accumulation=True)
    for weight in layer.parameters():
        cast(Any, weight).main_grad = torch.zeros(OUT, IN)
        cast(Any, weight).grad_added_to_main_grad = False
    layer(values(3, IN), [3, 0]).sum().backward()
    first, second = (cast(Any, weight) for weight in layer.parameters())
    assert first.main_grad.abs().sum() > 0
    assert second.main_grad.abs().sum() == 0
    assert second.grad_added_to_main_grad


@pytest.mark.parametrize(
    ("layout", "a", "b", "expected"),
    [
        ("TN", (OUT, IN), (TOKENS, IN), "to,io->ti"),
        ("NN", (OUT, IN), (TOKENS, OUT), "to,oi->ti"),
        ("NT", (TOKENS, IN), (TOKENS, OUT), "to,ti->oi"),
    ],
)
def test_general_gemm(layout: str, a: tuple[int, int], b: tuple[int, int], expected: str) -> None:
    """Inputs in bf16, products in fp32: nothing is rounded on the way."""
    left, right = values(*a).bfloat16(), values(*b, seed=1).bfloat16()
    found = general_gemm(left, right, None, out_dtype=torch.float32, layout=layout)[0]
    assert found is not None
    wanted = torch.einsum(expected, right.double(), left.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def _two_layers(rank: int, sequence_parallel: bool) -> list[Tensor]:
    """Column- then row-parallel: output of this rank, and gradients of x and both weights."""
    group = dist.group.WORLD
    assert group is not None
    options: dict[str, Any] = {
        "tp_group": group,
        "tp_size": 2,
        "bias": False,
        "sequence_parallel": sequence_parallel,
    }
    column = LayerNormLinear(IN, OUT, normalization="RMSNorm", parallel_mode="column", **options)
    row = Linear(OUT, IN, parallel_mode="row", **options)
    half = slice(rank * OUT // 2, (rank + 1) * OUT // 2)
    with torch.no_grad():
        column.weight.copy_(values(OUT, IN, seed=1)[half])
        row.weight.copy_(values(IN, OUT, seed=2)[:, half])
    tokens = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2) if sequence_parallel else slice(None)
    x = values(TOKENS, IN)[tokens].requires_grad_()
    y = row(column(x))
    y.backward(values(TOKENS, IN, seed=3)[tokens])
    norm = column.layer_norm_weight.grad
    assert x.grad is not None
    assert column.weight.grad is not None
    assert row.weight.grad is not None
    assert norm is not None
    return [y.detach(), x.grad, column.weight.grad, row.weight.grad, norm]


def _on_one_rank(sequence_parallel: bool) -> list[Tensor]:
    return _two_layers(dist.get_rank(), sequence_parallel)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_give_the_result_of_one(
    run_distributed: Callable[..., list[Any]], sequence_parallel: bool
) -> None:
    x = values(TOKENS, IN).double().requires_grad_()
    first = values(OUT, IN, seed=1).double().requires_grad_()
    second = values(IN, OUT, seed=2).double().requires_grad_()
    norm = torch.ones(IN, dtype=torch.float64, requires_grad=True)
    y = norm_reference(x, norm, 1e-5) @ first.T @ second.T
    y.backward(values(TOKENS, IN, seed=3).double())
    ranks = run_distributed(_on_one_rank, 2, sequence_parallel)
    outputs, inputs, columns, rows, norms = zip(*ranks, strict=True)
    if not sequence_parallel:  # each rank has all tokens; Megatron sums the norm's gradient otherwise
        outputs, inputs, norms = outputs[:1], inputs[:1], norms[:1]
    for found, wanted in (
        (torch.cat(outputs), y),
        (torch.cat(inputs), x.grad),
        (torch.cat(columns), first.grad),
        (torch.cat(rows, dim=1), second.grad),
        (torch.stack(norms).sum(0), norm.grad),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_marks_of_parameters() -> None:
    """By these Megatron knows what is cut and along which dimension, and what to sum over ranks."""
    column = Linear(IN, OUT, parallel_mode="column", tp_size=2)
    row = Linear(IN, OUT, parallel_mode="row", tp_size=2, sequence_parallel=True)
    assert (column.weight.shape, row.weight.shape) == ((OUT // 2, IN), (OUT, IN // 2))
    marks = [
        (vars(p)["tensor_model_parallel"], vars(p)["partition_dim"], vars(p)["partition_stride"])
        for p in (column.weight, row.weight, column.bias)
        if p is not None
    ]
    assert marks == [(True, 0, 1), (True, 1, 1), (True, 0, 1)]
    assert vars(row.bias)["sequence_parallel"]
    assert not hasattr(row.bias, "tensor_model_parallel")
    norm = LayerNormLinear(
        IN, OUT, normalization="RMSNorm", parallel_mode="column", tp_size=2, sequence_parallel=True
    )
    assert vars(norm.layer_norm_weight)["sequence_parallel"]
