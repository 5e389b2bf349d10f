"""Who owns a parameter, and what each rank holds of it. tests/distributed moves real states."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from megatron_drpo.policy.optimizer_state import _choose_owners, _split


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_no_rank_owns_more_than_its_share_and_one_parameter(num_ranks: int) -> None:
    """However a buffer's parameters lie on the ranks: many small ones, or one that is larger than a share."""
    generator = random.Random(num_ranks)
    for _ in range(50):
        sizes = [generator.choice((1, 3, 64, 500, 4000)) for _ in range(generator.randint(1, 40))]
        total = -(-sum(sizes) // num_ranks) * num_ranks
        bucket = SimpleNamespace(offset=0, grad_data=torch.empty(total, device="meta"))
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        counts = [_split(end - size, end, bucket, num_ranks) for size, end in zip(sizes, ends, strict=True)]
        assert [sum(count) for count in counts] == sizes
        assert all(sum(count[rank] for count in counts) <= total // num_ranks for rank in range(num_ranks))
        owners = _choose_owners(counts, num_ranks)
        for rank in range(num_ranks):
            owned = sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
            assert owned <= sum(sizes) / num_ranks + max(sizes)


def test_pieces_of_a_parameter_in_a_later_bucket_by_hand() -> None:
    """A bucket of 30 elements from 100 on, for three ranks: 100-109, 110-119, 120-129."""
    bucket = SimpleNamespace(offset=100, grad_data=torch.empty(30))
    assert _split(104, 125, bucket, 3) == [6, 10, 5]
    assert _split(110, 120, bucket, 3) == [0, 10, 0]
    assert _choose_owners([[6, 10, 5], [0, 0, 4]], 3) == [0, 2]
