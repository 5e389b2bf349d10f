"""Matrix products and exchange of one vocabulary shard, against float64 and hand computation."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_drpo.policy import vocabulary
from megatron_drpo.policy.vocabulary import VocabularyShard, add_product_, combine


@pytest.mark.parametrize("beta", [0, 1])
def test_products_are_added_in_place_or_replace_what_was_there(beta: int) -> None:
    left, right = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    total = torch.tensor([[100.0 if beta else math.nan]])
    add_product_(total, left, right, beta=beta)
    assert total.tolist() == [[11.0 + 100.0 * beta]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_of_a_shard_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows; 60 of 64 rows are ids, the rest padding."""
    monkeypatch.setattr(vocabulary, "_BLOCK_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(64, 16, generator=generator, dtype=torch.float64).to(dtype)
    hidden_CH = torch.randn(5, 16, generator=generator, dtype=torch.float64).to(dtype)
    shard = VocabularyShard(weight_VH, 60, None)
    sums = torch.float64 if dtype is torch.float64 else torch.float32
    logits_CV = torch.full((5, 60), math.nan, dtype=sums)
    shard.write_logits(logits_CV, hidden_CH)
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    expected = hidden_CH.double() @ weight_VH[:60].double().t()
    torch.testing.assert_close(logits_CV.double(), expected, rtol=tolerance, atol=tolerance)
    grad_CH = shard.grad_hidden(logits_CV)
    assert grad_CH.dtype is sums
    expected = expected @ weight_VH[:60].double()
    torch.testing.assert_close(grad_CH.double(), expected, rtol=tolerance, atol=100 * tolerance)


def test_a_16_bit_weight_is_cast_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "_CAST_BYTES", 10 * 16 * 4)
    shard = VocabularyShard(torch.ones(64, 16, dtype=torch.bfloat16), 64, None)
    assert [len(weight) for _, weight in shard._blocks()] == [10] * 6 + [4]


def test_combination_of_three_ranks_by_hand() -> None:
    """Vocabulary of 4 with probabilities 1/2, 1/4, 1/8, 1/8: ranks hold ids (0, 1), (2, 3) and padding.
    The label is 3, the further id is 1."""
    log2 = math.log(2)
    first = [math.log(0.75), math.log(3) - 2 / 3 * log2, -math.inf, -log2, 0.0, -2 * log2]
    second = [math.log(0.25), log2, -3 * log2, -3 * log2, 2.0, -math.inf]
    padding = [-math.inf, 0.0, -math.inf, -math.inf, 0.0, -math.inf]
    shift = torch.tensor([5.0, 0, 5.0, 5.0, 0, 5.0], dtype=torch.float64)  # a constant in all logits
    statistics_RNS = torch.tensor([[first], [second], [padding]], dtype=torch.float64) + shift
    combined = combine(statistics_RNS)
    expected = [5.0, 1.75 * log2, -3 * log2, -log2, 0, -2 * log2]
    assert [float(x.squeeze()) for x in combined] == pytest.approx(expected, abs=1e-14)


def test_of_equal_largest_logits_the_lowest_id_wins_across_ranks() -> None:
    """Rank 0 has its largest, 7, at id 3; rank 1 the same at id 5."""
    first, second = [8.0, 0.5, 1.0, 7.0, 3.0], [8.0, 0.5, -math.inf, 7.0, 5.0]
    assert combine(torch.tensor([[first], [second]])).argmax_N.tolist() == [3]
    assert combine(torch.tensor([[first], [[*second[:3], 7.5, 5.0]]])).argmax_N.tolist() == [5]
