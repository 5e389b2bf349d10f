"""The float64 model of the parity matrix against transformers, and its gradients against differences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tools.reference_model import ReferenceModel

KINDS = (
    "dense",
    "dense_tied",
    "moe",
    "moe_renormalised",
    "moe_bf16",
    "moe_mixed",
    "moe_sparse_step_tied",
)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(hf_model: Callable[[str], Path], kind: str) -> None:
    """Within float32's rounding of the largest logit, at every position of sequences of unequal lengths."""
    model = ReferenceModel(hf_model(kind))
    theirs = AutoModelForCausalLM.from_pretrained(
        hf_model(kind), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 37):
        token_ids = torch.randint(0, 101, (length,), generator=generator)
        with torch.no_grad():
            found, expected = model.logits(token_ids), theirs(token_ids[None]).logits[0]
        assert found.dtype == torch.float64
        scale = expected.abs().max()
        assert ((found - expected).abs().max() / scale).item() < 1e-5
        assert found.std() > 0.3, "the model says something"
    if "moe" in kind:
        assert 0 < model.router_margin < 1


@pytest.mark.parametrize("kind", ["dense_tied", "moe_mixed"])
def test_gradients_are_differences(hf_model: Callable[[str], Path], kind: str) -> None:
    """Every parameter is a leaf whose gradient is the central difference along that gradient."""
    model = ReferenceModel(hf_model(kind))
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, 101, (100,), generator=generator)
    direction = torch.randn(100, 101, generator=generator, dtype=torch.float64)
    leaves = list(model.parameters.values())
    gradients = torch.autograd.grad((model.logits(token_ids) * direction).sum(), leaves)
    for (name, parameter), gradient in zip(model.parameters.items(), gradients, strict=True):
        assert parameter.is_leaf, name
        assert parameter.dtype == torch.float64, name
        step = 1e-6 * gradient / gradient.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter.add_(sign * step)
                values.append((model.logits(token_ids) * direction).sum().item())
            parameter.add_(step)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient.norm().item(), rel=1e-4), name
