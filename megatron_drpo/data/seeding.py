"""Pseudo-random choices that are the same on every machine, under every version of every package."""

from __future__ import annotations

import hashlib


def seeded_permutation(length: int, *key: int) -> list[int]:
    """A permutation of range(length) that depends on `length` and `key` only.

    The indices are sorted by the SHA-256 of (key, index). Python documents that `random.shuffle` may change
    between versions, and so may the permutations of torch and numpy; a hash cannot, so a run resumed after
    an upgrade continues in the same order.
    """
    prefix = hashlib.sha256(",".join(map(str, key)).encode())

    def rank(index: int) -> bytes:
        digest = prefix.copy()
        digest.update(f";{index}".encode())
        return digest.digest()

    return sorted(range(length), key=rank)
