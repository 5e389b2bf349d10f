"""FusedAdam against torch's own, and the multi-tensor functions against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_drpo.errors import PlatformError
from megatron_drpo.platform.te_cpu.optimizers import (
    FusedAdam,
    multi_tensor_applier,
    multi_tensor_l2norm,
    multi_tensor_scale,
)


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(3)]


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs(decoupled: bool) -> None:
    """Over several steps, one of them without a gradient for one parameter, with a changing learning rate."""
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs = parameters(), parameters()
    found = FusedAdam(ours, adam_w_mode=decoupled, **options)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = kind(theirs, **options)
    for step in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(3, 2, generator=torch.Generator().manual_seed(step))
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        for optimizer in (found, expected):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found.state[mine][name], expected.state[other][name])
    assert found.param_groups[0]["step"] == 4
    assert "step" not in found.state[ours[0]]


def test_options_that_there_are_not() -> None:
    options: list[dict[str, Any]] = [{"amsgrad": True}, {"master_weights": True}, {"bias_correction": False}]
    for option in options:
        with pytest.raises(PlatformError, match="plain Adam only"):
            FusedAdam(parameters(), **option)


def test_norm_of_many_tensors() -> None:
    tensors: list[Tensor] = [parameter.detach().bfloat16() for parameter in parameters()]
    total, each = multi_tensor_applier(multi_tensor_l2norm, torch.zeros(1), [tensors], True)
    expected = torch.stack([tensor.double().norm() for tensor in tensors])
    torch.testing.assert_close(each.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(total.double(), expected.norm().reshape(1), rtol=1e-6, atol=0)
    assert multi_tensor_applier(multi_tensor_l2norm, torch.zeros(1), [tensors], False)[1].numel() == 0


def test_scaling_of_many_tensors() -> None:
    sources: list[Tensor] = [parameter.detach() for parameter in parameters()]
    targets = [torch.zeros_like(tensor) for tensor in sources]
    flag = torch.zeros(1, dtype=torch.int32)
    multi_tensor_applier(multi_tensor_scale, flag, [sources, targets], 0.5)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target, source * 0.5)
    assert flag.item() == 0
    sources[1][0, 0] = torch.inf
    multi_tensor_applier(multi_tensor_scale, flag, [sources, targets], 0.5)
    assert flag.item() == 1
