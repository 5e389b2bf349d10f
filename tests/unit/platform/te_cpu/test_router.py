"""Routing against Megatron's own."""

from __future__ import annotations

from typing import Any

import megatron.core.transformer.moe.moe_utils as moe_utils
import pytest
import torch
from torch import Tensor

from megatron_drpo.platform.te_cpu import router

TOKENS, EXPERTS, CHOSEN = 7, 5, 2


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pre_softmax", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_choice_of_experts(score_function: str, pre_softmax: bool, with_bias: bool) -> None:
    logits = values(TOKENS, EXPERTS)
    bias = values(EXPERTS, seed=1) if with_bias and score_function == "sigmoid" else None
    options: dict[str, Any] = {
        "topk": CHOSEN,
        "use_pre_softmax": pre_softmax,
        "scaling_factor": 2.5,
        "score_function": score_function,
        "expert_bias": bias,
    }
    probs, chosen = router.fused_topk_with_score_function(logits, **options)
    expected, expected_chosen = moe_utils.topk_routing_with_score_function(logits, **options)
    torch.testing.assert_close(probs, expected)
    assert torch.equal(chosen, expected_chosen)


def test_the_auxiliary_loss() -> None:
    """Megatron's own, whose terms are the same."""
    logits = values(TOKENS, EXPERTS)
    chosen, scores = router.fused_compute_score_for_moe_aux_loss(logits, CHOSEN, "softmax")
    expected_chosen, expected_scores = moe_utils.compute_routing_scores_for_aux_loss(
        logits, CHOSEN, "softmax"
    )
    assert torch.equal(chosen, expected_chosen)
    torch.testing.assert_close(scores, expected_scores)
    tokens = chosen.sum(0)
    found = router.fused_moe_aux_loss(scores, tokens, TOKENS, EXPERTS, CHOSEN, 0.1)
    expected = moe_utils.switch_load_balancing_loss_func(scores, tokens, TOKENS, CHOSEN, EXPERTS, 0.1)
    torch.testing.assert_close(found, expected)
