"""Where the gradient of the LM head's weight is summed, and what autograd and Megatron's DDP get to see.

Megatron's DDP gives each parameter an fp32 view of its gradient buffer, `main_grad`, and adds `grad` to it
in a hook after the parameter's gradient has been accumulated, unless `grad_added_to_main_grad` says that
this has happened. (megatron/core/distributed/distributed_data_parallel.py, `_make_backward_post_hook`.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_drpo.policy.vocabulary import accumulation_dtype, add_product_, operand_dtype


class WeightGradient:
    """The sum of dlogits^T hidden over chunks, in fp32 (float64 for float64).

    Straight into `main_grad` where the weight has one of that dtype: no [V, H] tensor is made. Otherwise into
    a buffer of its own, which `for_autograd` returns in the weight's dtype.
    """

    def __init__(self, weight_VH: Tensor) -> None:
        dtype = accumulation_dtype(weight_VH.dtype)
        main_grad: Tensor | None = getattr(weight_VH, "main_grad", None)
        self.weight: Any = weight_VH
        self.in_main_grad = main_grad is not None and main_grad.dtype is dtype
        self._operand_dtype = operand_dtype(weight_VH)
        self._sum_VH: Tensor = (
            main_grad
            if main_grad is not None and self.in_main_grad
            else torch.zeros_like(weight_VH, dtype=dtype, requires_grad=False)
        )

    def add(self, grad_logits_CV: Tensor, hidden_CH: Tensor) -> None:
        """Rows of the weight beyond the logits' columns are padding and get nothing."""
        ids_VH = self._sum_VH[: grad_logits_CV.shape[1]]
        if ids_VH.numel() > 0:
            add_product_(ids_VH, grad_logits_CV.t(), hidden_CH.to(self._operand_dtype))

    def for_autograd(self) -> Tensor | None:
        """What the backward pass returns for the weight; call it there, once.

        With the sum in main_grad, the hook must not add anything more. It still has to run, on the thread of
        the other gradients and with a `grad` that is not None, or `overlap_grad_reduce` cannot count the
        parameter as ready. So autograd gets a view of main_grad's own memory in the weight's shape and dtype,
        which takes no memory, whose numbers nobody reads, and which the hook drops. Without DDP's hook
        nobody would drop it: None then. A weight marked `zero_out_wgrad` (an embedding tied to the head on
        the same stage) gets its embedding's gradient in the same backward pass, and the hook adds that
        one: None as well, so that nothing mixes with it.
        """
        if not self.in_main_grad:
            return self._sum_VH.to(self.weight.dtype)
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        if getattr(self.weight, "zero_out_wgrad", False):
            return None
        memory = self._sum_VH.detach().view(-1).view(self.weight.dtype)
        return memory[: self.weight.numel()].view_as(self.weight)
