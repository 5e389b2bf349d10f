"""SGLang's hash of a parameter on a GPU, against a plain transcription of its kernels, word by word."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_drpo.weight_sync import gpu_hash
from megatron_drpo.weight_sync.gpu_hash import GpuDigest

M32, M64 = 2**32 - 1, 2**64 - 1


def fmix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B & M32
    x ^= x >> 13
    x = x * 0xC2B2AE35 & M32
    return x ^ x >> 16


def rotl32(x: int, bits: int) -> int:
    return (x << bits | x >> (32 - bits)) & M32


def reference(data: bytes) -> str:
    """hash_tiles32_kernel_blocked, add_tree_reduce_u64_kernel and _final_splitmix64 in Python's integers."""
    words = np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4").tolist()
    seed1, seed2 = 0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & M32
    total = 0
    for start in range(0, len(words), 8192):
        h1 = h2 = 0
        for i, word in enumerate(words[start : start + 8192], start):
            h1 += fmix32(word ^ ((i * 0x27D4EB2D + seed1) & M32) ^ rotl32(i, 15))
            h2 += fmix32(word ^ ((i * 0x165667B1 + seed2) & M32) ^ rotl32(i, 13))
        h1, h2 = (fmix32(h & M32 ^ len(words) * 4 & M32) for h in (h1, h2))
        total += h1 << 32 | h2
    x = total & M64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return f"{x ^ x >> 31:016x}"


@pytest.mark.parametrize("num_bytes", [1, 4, 7, 4 * 8192, 4 * 8192 + 2, 100_003])
@pytest.mark.parametrize("chunk_bytes", [8, 4 * 5000, 16 * 2**20])
def test_equal_to_the_kernels(num_bytes: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the parameter is cut into pieces, and the pieces are put together."""
    chunk_bytes = max(chunk_bytes, num_bytes // 20)
    monkeypatch.setattr(gpu_hash, "_CHUNK_BYTES", -(-chunk_bytes // 4) * 4)
    torch.manual_seed(num_bytes)
    data = torch.randint(256, (num_bytes,), dtype=torch.uint8)
    expected = reference(data.numpy().tobytes())
    for cuts in ([num_bytes], [num_bytes // 3], sorted([1, num_bytes // 2, num_bytes - 1])):
        digest = GpuDigest()
        for piece in np.split(data.numpy(), cuts):
            digest.update(torch.from_numpy(piece.copy()))
        assert digest.hexdigest() == expected


def test_nothing_has_zeros() -> None:
    assert GpuDigest().hexdigest() == "0" * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_do_not_matter_and_every_bit_does(dtype: torch.dtype) -> None:
    tensor = torch.randn(33, 40).to(dtype)

    def digest(values: torch.Tensor) -> str:
        found = GpuDigest()
        found.update(values)
        return found.hexdigest()

    expected = reference(tensor.view(torch.uint8).numpy().tobytes())
    assert digest(tensor) == digest(tensor.T.contiguous().T) == expected
    for bit in (0, 5, 7):
        flipped = tensor.clone()
        flipped.view(torch.uint8)[17, 3] ^= 1 << bit
        assert digest(flipped) != expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_matter() -> None:
    tensor = torch.randn(999, 1003).to(torch.bfloat16)
    here, there = GpuDigest(), GpuDigest()
    here.update(tensor)
    there.update(tensor.cuda())
    assert here.hexdigest() == there.hexdigest()
