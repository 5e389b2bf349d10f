"""Permutation of tokens against Megatron's own."""

from __future__ import annotations

import megatron.core.transformer.moe.moe_utils as moe_utils
import pytest
import torch
from torch import Tensor

from megatron_drpo.platform.te_cpu import permutation

TOKENS, EXPERTS, HIDDEN, CHOSEN = 7, 5, 4, 2


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def routing() -> tuple[Tensor, Tensor]:
    """Probabilities [T, E] and which experts are chosen [T, E]; the last expert by nobody."""
    scores = values(TOKENS, EXPERTS)
    scores[:, -1] = -9
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, scores.topk(CHOSEN).indices, True)
    return scores.softmax(-1) * chosen, chosen


@pytest.mark.parametrize("with_probs", [False, True])
def test_permutation_there_and_back(routing: tuple[Tensor, Tensor], with_probs: bool) -> None:
    probs, chosen = routing
    x = values(TOKENS, HIDDEN)
    num_rows = TOKENS * CHOSEN
    expected, expected_probs, order, *_ = moe_utils.permute(x, chosen, probs=probs, num_out_tokens=num_rows)
    if with_probs:
        rows, row_probs, row_ids = permutation.moe_permute_with_probs(x, probs, chosen, num_rows)
        assert expected_probs is not None
        assert torch.equal(row_probs, expected_probs)
    else:
        rows, row_ids = permutation.moe_permute(x, chosen, num_rows)
    assert torch.equal(rows, expected)
    weights = probs if with_probs else None
    found = permutation.moe_unpermute(rows, row_ids, merging_probs=weights, restore_shape=x.shape)
    wanted = moe_utils.unpermute(expected, order, x.shape, probs=weights, routing_map=chosen)
    torch.testing.assert_close(found, wanted)


def test_experts_of_a_token_are_added_in_fp32() -> None:
    """Rounded after each addition, 1 + 2^-9 + .. + 2^-9 would stay 1 in bf16."""
    chosen = torch.ones(1, 9, dtype=torch.bool)
    rows, row_ids = permutation.moe_permute(torch.zeros(1, 1).bfloat16(), chosen)
    rows = torch.tensor([[1.0], *[[2.0**-9]] * 8]).bfloat16()
    assert permutation.moe_unpermute(rows, row_ids, restore_shape=torch.Size([1, 1])).item() == 1 + 2.0**-6


def test_gradients_of_the_permutation(routing: tuple[Tensor, Tensor]) -> None:
    _, chosen = routing
    grads = []
    for is_ours in (True, False):
        x = values(TOKENS, HIDDEN).double().requires_grad_()
        if is_ours:
            rows, row_ids = permutation.moe_permute(x, chosen)
            out = permutation.moe_unpermute(rows.sin(), row_ids, restore_shape=x.shape)
        else:
            rows, _, order, *_ = moe_utils.permute(x, chosen, num_out_tokens=int(chosen.sum()))
            out = moe_utils.unpermute(rows.sin(), order, x.shape)
        (out * values(TOKENS, HIDDEN, seed=1)).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)


def test_chunks_in_another_order() -> None:
    x, probs = values(9, HIDDEN), values(9, seed=1)
    sizes, order = torch.tensor([2, 0, 4, 3]), torch.tensor([3, 1, 0, 2])
    expected, expected_probs = moe_utils.sort_chunks_by_idxs(x, sizes, order, probs=probs)
    found, found_probs = permutation.moe_sort_chunks_by_index_with_probs(x, probs, sizes, order)
    assert torch.equal(found, expected)
    assert expected_probs is not None
    assert torch.equal(found_probs, expected_probs)
    assert torch.equal(permutation.moe_sort_chunks_by_index(x, sizes, order), expected)
