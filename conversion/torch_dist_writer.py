"""Writes the torch_dist format without a model, a process group or a GPU.

The format is torch's distributed checkpoint: `.distcp` files hold one torch.save after the other, and
`.metadata`, a pickle, says where each rectangle of each tensor is. Megatron adds `metadata.json` and, before
0.19, `common.pt`; later versions still read both. Tested with the loaders of megatron-core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # DCP has no public name for it
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from conversion.torch_dist_reader import Chunk
from conversion.workspace import flush_path, start_writeback
from megatron_drpo.weights.torch_dist import COMMON_FILE, CONFIG_FILE, METADATA_FILE

_OBJECTS_FILE = "__objects_0.distcp"
_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_COMMON_CONFIG = {"common_backend": "torch", "common_backend_version": 1}


class DataFile:
    """One `.distcp` file, written in order. It has its name only when it is complete and on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: list[tuple[int, int]] = []
        """Position and size of every tensor added."""
        self._partial = path.with_name(f".{path.name}.partial")
        self._hash = hashlib.sha256()
        self._position = 0
        self._error: OSError | None = None

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        # Nothing reads the checksums in torch's archives, and they cost more than all else together.
        torch.serialization.set_crc32_options(False)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
                self._partial.rename(self.path)
                flush_path(self.path.parent)
        finally:
            os.close(self._descriptor)

    @property
    def num_bytes(self) -> int:
        return self._position

    def add(self, tensor: torch.Tensor) -> None:
        """Append one tensor, as shaped in the global tensor: leading dimensions of 1 included."""
        start = self._position
        try:
            torch.save(tensor, cast(IO[bytes], self))  # all it needs is write() and flush()
        except Exception:
            if self._error is not None:  # torch reports it as something else
                raise self._error from None
            raise
        self.places.append((start, self._position - start))
        start_writeback(self._descriptor, *self.places[-1])

    def write(self, content: Any) -> int:
        """Called by torch.save."""
        view = memoryview(content).cast("B")
        self._hash.update(view)
        size = len(view)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            self._error = error
            raise
        self._position += size
        return size

    def flush(self) -> None:
        """Called by torch.save; nothing is buffered here."""

    def sha256(self) -> str:
        """Of everything written so far, as hexadecimal digits."""
        return self._hash.hexdigest()


class GlobalTensor(NamedTuple):
    """A tensor of the checkpoint as a whole."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def write_metadata(
    folder: Path, tensors: Iterable[tuple[GlobalTensor, Chunk]], empty_objects: Iterable[str]
) -> None:
    """`.metadata`, and a file for objects that are None.

    Args:
        folder: the checkpoint, which holds the data files.
        tensors: every chunk with its tensor.
        empty_objects: keys of objects.
    """
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for tensor, chunk in tensors:
        if tensor.key not in entries:
            properties = TensorProperties(dtype=tensor.dtype)
            entries[tensor.key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), [])
        chunks = entries[tensor.key].chunks
        index = MetadataIndex(tensor.key, chunk.offset, len(chunks))
        storage[index] = _StorageInfo(chunk.file, chunk.position, chunk.num_bytes)
        chunks.append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)))
    nothing = io.BytesIO()
    torch.save([None], nothing)
    (folder / _OBJECTS_FILE).write_bytes(nothing.getvalue())
    for key in empty_objects:  # all the same, so all in the same place
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(_OBJECTS_FILE, 0, len(nothing.getvalue()))
    metadata = Metadata(entries, storage_data=storage, storage_meta=StorageMeta())
    with (folder / METADATA_FILE).open("wb") as stream:
        pickle.dump(metadata, stream)


def write_common_state(folder: Path, state: dict[str, Any]) -> None:
    """What is not sharded, and the name of the format; `state` has plain types only."""
    content = io.BytesIO()  # torch reports a full disk as anything but an OSError
    torch.save(state, content)
    (folder / COMMON_FILE).write_bytes(content.getvalue())
    (folder / CONFIG_FILE).write_text(json.dumps(_CONFIG | _COMMON_CONFIG), "utf-8")


def data_file_name(unit: int) -> str:
    """As Megatron's writers name theirs: one per process and thread."""
    return f"__{unit}_0.distcp"


def with_leading_ones(tensor: torch.Tensor, leading_shape: Sequence[int]) -> torch.Tensor:
    """A matrix as a chunk of its stacked tensor."""
    return tensor.reshape(*(1 for _ in leading_shape), *tensor.shape)
