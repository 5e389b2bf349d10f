"""Safetensors files written in any order by several processes: their headers are known beforehand."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from conversion.workspace import start_writeback
from megatron_drpo.weights.hf_folder import shard_file
from megatron_drpo.weights.safetensors_header import build_header


class _TensorPlace(NamedTuple):
    file: str
    position: int
    row_bytes: int


class HfTarget:
    """The weights of an HF folder."""

    def __init__(
        self, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int
    ) -> None:
        """
        Args:
            tensors: name -> shape and dtype, in the order of the files.
            max_shard_bytes: of the data of one file; a single larger tensor has a file of its own.
        """
        shards = _split(tensors, max_shard_bytes)
        self.weight_map: dict[str, str] = {}
        """Tensor -> file."""
        self.total_bytes = 0
        """Of all tensors."""
        self._files: dict[str, tuple[bytes, int]] = {}
        self._places: dict[str, _TensorPlace] = {}
        self._descriptors: dict[str, int] = {}
        for number, names in enumerate(shards, 1):
            file = shard_file(number, len(shards))
            prefix, positions, size = build_header({name: tensors[name] for name in names}, {"format": "pt"})
            self._files[file] = prefix, size
            self.total_bytes += size - len(prefix)
            for name in names:
                shape, dtype = tensors[name]
                row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
                self._places[name] = _TensorPlace(file, positions[name], row_bytes)
                self.weight_map[name] = file

    def create(self, folder: Path) -> None:
        """Make the files, in full size and without data; those of an interrupted run stay as they are."""
        for file, (prefix, size) in self._files.items():
            with (folder / file).open("ab") as stream:
                os.truncate(stream.fileno(), size)
                descriptor = os.open(folder / file, os.O_WRONLY)
                try:
                    os.pwrite(descriptor, prefix, 0)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def write_rows(self, folder: Path, name: str, row: int, values: torch.Tensor) -> None:
        """Rows [row, row + len(values)) of a tensor, in the dtype of the plan."""
        place = self._places[name]
        if place.file not in self._descriptors:
            self._descriptors[place.file] = os.open(folder / place.file, os.O_WRONLY)
        descriptor = self._descriptors[place.file]
        view = memoryview(as_bytes(values))
        start = position = place.position + row * place.row_bytes
        while view:
            count = os.pwrite(descriptor, view, position)
            view, position = view[count:], position + count
        start_writeback(descriptor, start, position - start)

    def flush(self) -> None:
        """Have what this process wrote on the disk."""
        for descriptor in self._descriptors.values():
            os.fdatasync(descriptor)
            os.close(descriptor)
        self._descriptors.clear()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _split(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -1
    for name, (shape, dtype) in tensors.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= num_bytes
    return shards
