"""Every tensor is hashed once, in order, and few are kept for it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megatron_drpo.weight_sync.source_hash import SourceHasher


def test_all_are_hashed_when_the_stream_ends() -> None:
    """In a thread; not more is kept than was said, or one tensor."""
    hasher = SourceHasher(max_bytes=8)
    tensors = [
        (f"t{i}", torch.full((size,), i, dtype=torch.uint8)) for i, size in enumerate([4, 4, 4, 20, 1])
    ]
    added: list[str] = []
    num_behind: list[int] = []

    def add(name: str, tensor: torch.Tensor) -> None:
        assert threading.current_thread() is not threading.main_thread()
        time.sleep(0.02)
        added.append(name)

    names = []
    for name, _ in hasher.watch(tensors, add):
        names.append(name)
        num_behind.append(len(names) - len(added))
    hasher.close()
    assert names == added == [name for name, _ in tensors]
    assert all(behind <= most + 1 for behind, most in zip(num_behind, [1, 2, 2, 1, 1], strict=True))


def test_what_goes_wrong_in_the_thread_is_raised() -> None:
    hasher = SourceHasher(max_bytes=8)

    def add(name: str, tensor: torch.Tensor) -> None:
        raise ValueError(name)

    with pytest.raises(ValueError, match="t0"):
        list(hasher.watch([("t0", torch.zeros(1))], add))
    hasher.close()
