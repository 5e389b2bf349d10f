"""One number for all weights of a model, computed alike by the sender (streaming) and by the receiver."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

_MODULUS = 2**64


def tensor_digest(name: str, tensor: torch.Tensor) -> int:
    """64-bit BLAKE2b of a CPU tensor's name, dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode(), digest_size=8)
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big")


class WeightsChecksum:
    """Sum of the tensors' digests modulo 2^64: the order in which tensors are added does not matter."""

    def __init__(self) -> None:
        self._total = 0

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Take in one tensor; returns its own digest as 16 hexadecimal digits."""
        digest = tensor_digest(name, tensor)
        self._total = (self._total + digest) % _MODULUS
        return f"{digest:016x}"

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        return f"{self._total:016x}"


class HfChecksums:
    """Every tensor's digest by its HF name, as the embedded server reports them."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in one tensor."""
        self._digests[name] = f"{tensor_digest(name, tensor.cpu()):016x}"

    def checksums(self) -> list[dict[str, str]]:
        """Of the server's only rank: 16 hexadecimal digits by name."""
        return [self._digests]


def compute_checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The checksum of HF-named CPU tensors, as 16 hexadecimal digits."""
    checksum = WeightsChecksum()
    for name, tensor in tensors:
        checksum.add(name, tensor)
    return checksum.hexdigest()
