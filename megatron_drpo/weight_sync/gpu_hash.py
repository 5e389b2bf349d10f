"""The hash that SGLang takes of a parameter on a GPU, computed here on any device and piece by piece.

Words of 32 bits are mixed with their position and summed within tiles of 8192; the tiles' sums are mixed and
summed. Here it takes about 40 passes of integer arithmetic, in buffers of a few ten megabytes. Source:
https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/kernels/ops/memory/gpu_tensor_hash.py
"""

from __future__ import annotations

import numpy as np
import torch

_TILE = 8192
"""Words."""
_CHUNK_BYTES = 16 * 2**20
"""Pieces are hashed together until they have so many bytes: experts are thousands of small ones."""
_WORD = 4
_MASK = 2**32 - 1
_SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK)
_POSITIONS = ((0x27D4EB2D, 15), (0x165667B1, 13))
_MIX = (0x85EBCA6B, 0xC2B2AE35)


class GpuDigest:
    """Takes a parameter's bytes in order; `hexdigest` is what the server reports of it."""

    def __init__(self) -> None:
        self._pending: list[torch.Tensor] = []
        self._num_pending = 0
        self._num_words = 0
        """That are hashed."""
        self._sums: list[torch.Tensor] = []
        """[2, tiles] int64 of one run of words each."""
        self._first_tiles: list[int] = []

    def update(self, tensor: torch.Tensor) -> None:
        """Take in the next values, of any dtype, on any device."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._pending.append(flat)
        self._num_pending += flat.numel()
        if self._num_pending >= _CHUNK_BYTES:
            self._hash_pending(is_last=False)

    def finish(self) -> None:
        """Nothing comes any more: keep no tensor."""
        self._hash_pending(is_last=True)

    def hexdigest(self) -> str:
        """16 hexadecimal digits."""
        self.finish()
        if not self._num_words:
            return "0" * 16
        tiles = np.zeros((2, -(-self._num_words // _TILE)), dtype=np.int64)
        for first, sums in zip(self._first_tiles, self._on_cpu(), strict=True):
            tiles[:, first : first + sums.shape[1]] += sums
        mixed = _mix_tiles((tiles & _MASK) ^ (self._num_words * _WORD & _MASK)).astype(np.uint64)
        total = int((mixed[0] << np.uint64(32) | mixed[1]).sum(dtype=np.uint64))
        return f"{_splitmix64(total):016x}"

    def _on_cpu(self) -> list[np.ndarray]:
        """All sums, with one transfer."""
        sizes = [sums.shape[1] for sums in self._sums]
        return np.split(torch.cat(self._sums, dim=1).cpu().numpy(), np.cumsum(sizes)[:-1], axis=1)

    def _hash_pending(self, *, is_last: bool) -> None:
        if not self._num_pending:
            return
        data = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
        self._pending.clear()
        self._num_pending = 0
        rest = data.numel() % _WORD
        if rest and is_last:  # zeros make the last word whole
            data = torch.cat([data, data.new_zeros(_WORD - rest)])
        elif rest:
            self._pending.append(data[-rest:].clone())
            self._num_pending = rest
            data = data[:-rest]
        if data.storage_offset() % _WORD:
            data = data.clone()
        for words in data.view(torch.int32).split(_CHUNK_BYTES // _WORD):
            self._first_tiles.append(self._num_words // _TILE)
            self._sums.append(_sum_tiles(words, self._num_words))
            self._num_words += words.numel()


def _sum_tiles(words: torch.Tensor, start: int) -> torch.Tensor:
    """The tiles' sums of a run of words, without those of other words of the first and the last tile.

    Args:
        words: [N] int32.
        start: place of the first one in the parameter.

    Returns:
        [2, T] int64; what is beyond 32 bits has no meaning.
    """
    index = torch.arange(start, start + words.numel(), device=words.device).to(torch.int32)
    before = start % _TILE
    after = -(before + words.numel()) % _TILE
    sums = []
    for seed, (factor, bits) in zip(_SEEDS, _POSITIONS, strict=True):
        mixed = index * _signed(factor)
        mixed += _signed(seed)
        mixed ^= (index << bits) | ((index >> (32 - bits)) & (2**bits - 1))
        mixed ^= words
        for shift, multiplier in ((16, _MIX[0]), (13, _MIX[1]), (16, 1)):
            mixed ^= (mixed >> shift) & (2 ** (32 - shift) - 1)  # of int32 torch shifts the sign in
            mixed *= _signed(multiplier)
        padded = torch.nn.functional.pad(mixed, (before, after))
        sums.append(padded.view(-1, _TILE).sum(1, dtype=torch.int64))
    return torch.stack(sums)


def _signed(value: int) -> int:
    """A number of 32 bits as an int32 has it."""
    return value - 2**32 if value >= 2**31 else value


def _mix_tiles(values: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser of numbers below 2^32."""
    values = values.astype(np.uint64)
    for shift, multiplier in ((16, _MIX[0]), (13, _MIX[1]), (16, 1)):
        values ^= values >> np.uint64(shift)
        values = values * np.uint64(multiplier) & np.uint64(_MASK)
    return values


def _splitmix64(value: int) -> int:
    mask = 2**64 - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31
