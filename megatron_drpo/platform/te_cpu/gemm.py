"""The product of tokens and a weight, whose gradient may be added to Megatron's fp32 buffer at once.

https://github.com/NVIDIA/TransformerEngine/blob/v2.11/transformer_engine/pytorch/module/linear.py

    R  rows (tokens)      I  input features      O  output features
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def multiply(x: Tensor, weight_OI: Tensor, fuse_wgrad_accumulation: bool) -> Tensor:
    """`x` [..., I] by the weight: [..., O].

    Args:
        fuse_wgrad_accumulation: the backward pass adds the weight's gradient to `weight_OI.main_grad`, in
            that buffer's dtype, sets `grad_added_to_main_grad`, and gives autograd one that nobody reads.
    """
    rows_RI = x.reshape(-1, x.shape[-1])
    return _Product.apply(rows_RI, weight_OI, fuse_wgrad_accumulation).view(*x.shape[:-1], len(weight_OI))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # pyrefly: ignore[bad-override]  # torch types it as (*args, **kwargs)
        ctx: Any, x_RI: Tensor, weight_OI: Tensor, fuse: bool
    ) -> Tensor:
        ctx.fuse = fuse
        ctx.weight = weight_OI  # the parameter itself: its main_grad is no part of the graph
        ctx.save_for_backward(x_RI, weight_OI)
        return x_RI @ weight_OI.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, weight_OI = ctx.saved_tensors
        grad_RO = grads[0]
        grad_x_RI = grad_RO @ weight_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x_RI, None, None
        if not ctx.fuse:
            return grad_x_RI, grad_RO.t() @ x_RI, None
        main_grad = ctx.weight.main_grad
        main_grad.addmm_(grad_RO.t().to(main_grad.dtype), x_RI.to(main_grad.dtype))
        if not hasattr(ctx.weight, "grad_added_to_main_grad"):
            return grad_x_RI, None, None
        ctx.weight.grad_added_to_main_grad = True
        zero = getattr(ctx.weight, "zero_out_wgrad", False)
        return grad_x_RI, get_dummy_wgrad(weight_OI.shape, weight_OI.dtype, zero), None


@functools.cache
def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def get_dummy_wgrad(shape: Sequence[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """A gradient for autograd alone, in memory that all weights of this shape share."""
    memory = _shared(tuple(shape), dtype)
    if zero:
        memory.zero_()
    return memory.detach()


def get_workspace() -> None:
    """Memory that cuBLAS wants and a CPU does not."""
    return None


def general_gemm(
    A: Tensor,
    B: Tensor,
    *_: object,
    out_dtype: torch.dtype | None = None,
    layout: str = "TN",
    bias: Tensor | None = None,
    grad: bool = False,
    **__: object,
) -> list[Tensor | None]:
    """cuBLAS's product in its column-major words: "TN" is B A^T of row-major matrices, "NN" B A, "NT" B^T A.

    Products are accumulated in fp32 and rounded once, to `out_dtype`. With `grad` there is no bias.

    Returns:
        Four values as in Transformer Engine, of which Megatron reads the first.
    """
    a, b = A.float(), B.float()
    out = (b.t() if layout == "NT" else b) @ (a.t() if layout == "TN" else a)
    if bias is not None and not grad:
        out = out + bias.float()
    return [out.to(out_dtype or A.dtype), None, None, None]
