"""Rows of an HF folder's tensors, read with plain reads into one buffer that is used again.

Not through memory maps: their pages count as resident memory of the process.
"""

from __future__ import annotations

import os

import torch

from conversion.manifest import Manifest
from megatron_drpo.errors import ModelError
from megatron_drpo.weights.hf_folder import HfFolder


class HfRows:
    """Reads what is stored, as it is stored, and compares it with its hashes."""

    def __init__(self, folder: HfFolder, manifest: Manifest | None) -> None:
        """
        Args:
            manifest: the folder's; None: there are no hashes to compare with.
        """
        self._folder = folder
        self._manifest = manifest
        self._buffer = bytearray()
        self._descriptors: dict[str, int] = {}

    def read(self, name: str, row: int, num_rows: int) -> torch.Tensor:
        """Rows [row, row + num_rows) of a tensor, in a buffer that the next call overwrites.

        Raises:
            ModelError: the file ends early, cannot be read, or does not hold what these tools wrote there.
        """
        info = self._folder.info(name)
        row_bytes = torch.Size(info.shape[1:]).numel() * info.dtype.itemsize
        raw = self._pread(info.shard, info.offset + row * row_bytes, num_rows * row_bytes)
        # A tensor of its own on this memory: torch.save writes the whole storage of a view.
        rows = torch.frombuffer(raw, dtype=info.dtype).view(num_rows, *info.shape[1:])
        problem = None if self._manifest is None else self._manifest.problem(name, row, rows)
        if problem is not None:
            raise ModelError(f"{self._folder.path / info.shard}: damaged: {problem}")
        return rows

    def _pread(self, shard: str, offset: int, num_bytes: int) -> memoryview:
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        view = memoryview(self._buffer)[:num_bytes]
        path = self._folder.path / shard
        try:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(path, os.O_RDONLY)
            done = 0
            while done < num_bytes:  # one call reads at most 2 GiB
                count = os.preadv(self._descriptors[shard], [view[done:]], offset + done)
                if count == 0:
                    raise ModelError(
                        f"{path}: ends {num_bytes - done} bytes early: it changed while being read"
                    )
                done += count
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error
        return view
