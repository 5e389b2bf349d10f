from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from megatron_drpo.data.seeding import seeded_permutation

GOLDEN = [6, 1, 7, 5, 2, 0, 3, 4]


def test_order_is_that_of_the_documented_hash() -> None:
    hashes = {i: hashlib.sha256(f"3,14;{i}".encode()).hexdigest() for i in range(100)}
    assert seeded_permutation(100, 3, 14) == sorted(hashes, key=hashes.__getitem__)


def test_order_never_changes() -> None:
    assert seeded_permutation(8, 0, 0) == GOLDEN
    assert seeded_permutation(8, 0, 1) != GOLDEN
    assert seeded_permutation(8, 1, 0) != GOLDEN


@given(st.integers(0, 200), st.integers(), st.integers())
def test_every_index_occurs_once(length: int, seed: int, epoch: int) -> None:
    assert sorted(seeded_permutation(length, seed, epoch)) == list(range(length))


def test_positions_are_spread_evenly() -> None:
    """Where index 0 of 10 lands over 5,000 keys: chi-squared with 9 degrees of freedom."""
    counts = [0] * 10
    for key in range(5000):
        counts[seeded_permutation(10, key).index(0)] += 1
    assert sum((count - 500) ** 2 / 500 for count in counts) < 27.9  # p = 0.001
