"""Reads a torch_dist checkpoint tensor by tensor: no model, no process group, no Megatron.

Format: torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_drpo.errors import CheckpointError
from megatron_drpo.weights.integrity import check_description
from megatron_drpo.weights.torch_dist import CONFIG_FILE, METADATA_FILE, find_checkpoint, read_metadata


class Chunk(NamedTuple):
    """A rectangle of a tensor and where its bytes are."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    position: int
    num_bytes: int


class StoredTensor(NamedTuple):
    """A tensor of the checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class TorchDistReader:
    """A checkpoint folder opened for reading; `.metadata` is read at once, tensors on demand."""

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: whatever `find_checkpoint` takes.

        Raises:
            CheckpointError: there is no complete checkpoint, or a file it names is missing or too short.
        """
        self.path = find_checkpoint(path)
        check_description(self.path)
        _check_format(self.path / CONFIG_FILE)
        metadata = read_metadata(self.path / METADATA_FILE)
        self.tensors: dict[str, StoredTensor] = {}
        """By key."""
        self.objects: list[str] = []
        """Keys of what is not a tensor."""
        try:
            self._read_table(metadata)
        except CheckpointError:
            raise
        # What a damaged table holds may have any type.
        except Exception as error:
            raise CheckpointError(f"{self.path / METADATA_FILE}: damaged: {error!r}") from error
        # One blob is cut into several reads in a row.
        self._load = lru_cache(maxsize=1)(self._load_chunk)

    def _read_table(self, metadata: Metadata) -> None:
        chunks = _chunks_by_key(metadata)
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                tensor = StoredTensor(tuple(entry.size), entry.properties.dtype, tuple(chunks[key]))
                _check_tensor(key, tensor)
                self.tensors[key] = tensor
            elif isinstance(entry, BytesStorageMetadata):
                self.objects.append(key)
            else:
                raise TypeError(f"{key!r} is {entry!r}")
        self._index = _ChunkIndex(self.tensors)
        self._storage = metadata.storage_data
        self._check_files()

    def read(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A rectangle of a tensor, in the checkpoint's dtype.

        Raises:
            CheckpointError: its bytes are damaged or do not cover it.
        """
        chunks = self.chunks_in(key, offset, shape)
        if len(chunks) == 1 and chunks[0].shape == tuple(shape):
            return self._load(chunks[0])
        result = torch.empty(tuple(shape), dtype=self.tensors[key].dtype)
        covered = 0
        for chunk in chunks:
            part = _intersection(chunk, offset, shape)
            assert part is not None
            source = tuple(slice(a - o, b - o) for (a, b), o in zip(part, chunk.offset, strict=True))
            target = tuple(slice(a - o, b - o) for (a, b), o in zip(part, offset, strict=True))
            piece = self._load(chunk)[source]
            result[target] = piece
            covered += piece.numel()
        if covered != result.numel():
            raise CheckpointError(
                f"{self.path}: tensor {key!r} at {list(offset)}: {covered} of {result.numel()} elements "
                "are stored"
            )
        return result

    def chunks_in(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> list[Chunk]:
        """The chunks that a rectangle of a tensor touches."""
        return [
            chunk
            for chunk in self._index.candidates(key, offset, shape)
            if _intersection(chunk, offset, shape) is not None
        ]

    def read_object(self, key: str) -> Any:
        """What is stored under the key of an object; only plain types are allowed in it."""
        info = next(info for index, info in self._storage.items() if index.fqn == key)
        with (self.path / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            return torch.load(io.BytesIO(stream.read(info.length)), weights_only=True)

    def _load_chunk(self, chunk: Chunk) -> torch.Tensor:
        file = self.path / chunk.file
        where = f"{file}: tensor {chunk.key!r} at offset {list(chunk.offset)}"
        try:
            with file.open("rb", buffering=0) as stream:
                view = _View(stream, chunk.position, chunk.num_bytes)
                tensor = torch.load(cast(IO[bytes], view), map_location="cpu", weights_only=True)
        # A damaged archive raises whatever its reader happens to meet.
        except Exception as error:
            raise CheckpointError(f"{where} cannot be read: {error}") from error
        expected = f"{list(chunk.shape)} {self.tensors[chunk.key].dtype}"
        found = f"{list(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else "no tensor"
        if found != expected:
            raise CheckpointError(f"{where}: {METADATA_FILE} says {expected}, found {found}")
        return tensor.contiguous()

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, but {METADATA_FILE} names it")
            if file.stat().st_size < end:
                raise CheckpointError(
                    f"{file}: truncated: {file.stat().st_size} bytes, {METADATA_FILE} needs {end}"
                )


def _check_format(file: Path) -> None:
    """Raise CheckpointError unless metadata.json says torch_dist."""
    try:
        backend = json.loads(file.read_text("utf-8"))["sharded_backend"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error
    if backend != "torch_dist":
        raise CheckpointError(f"{file}: the format is {backend!r}, only 'torch_dist' can be read")


def _check_tensor(key: str, tensor: StoredTensor) -> None:
    """Raise ValueError if the shape, the dtype or a chunk cannot be."""
    if not isinstance(tensor.dtype, torch.dtype):
        raise ValueError(f"the dtype of {key!r} is {tensor.dtype!r}")
    for chunk in tensor.chunks:
        for start, size, whole in zip(chunk.offset, chunk.shape, tensor.shape, strict=True):
            if not (start >= 0 and size >= 0 and start + size <= whole):
                raise ValueError(f"a chunk of {key!r} lies outside of it: {chunk.offset}, {chunk.shape}")


def _chunks_by_key(metadata: Metadata) -> dict[str, list[Chunk]]:
    chunks: dict[str, list[Chunk]] = {}
    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata):
            continue
        stored = [c for c in _candidates(entry, index) if tuple(c.offsets) == tuple(index.offset)]
        if not stored:
            raise CheckpointError(f"tensor {index.fqn!r}: no shape for the chunk at {list(index.offset)}")
        place = (info.relative_path, info.offset, info.length)
        chunks.setdefault(index.fqn, []).append(
            Chunk(index.fqn, tuple(index.offset), tuple(stored[0].sizes), *place)
        )
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and len(chunks.get(key, ())) != len(entry.chunks):
            raise CheckpointError(
                f"tensor {key!r}: {len(chunks.get(key, ()))} of {len(entry.chunks)} chunks are stored"
            )
    return chunks


class _ChunkIndex:
    """Finds chunks by layer and expert: a stacked tensor has tens of thousands."""

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._num_leading: dict[str, int] = {}
        self._by_prefix: dict[tuple[str, tuple[int, ...]], list[Chunk]] = {}
        for key, tensor in tensors.items():
            count = len(tensor.shape) - 1
            while count > 0 and any(size != 1 for chunk in tensor.chunks for size in chunk.shape[:count]):
                count -= 1
            count = max(count, 0)
            self._num_leading[key] = count
            for chunk in tensor.chunks:
                self._by_prefix.setdefault((key, chunk.offset[:count]), []).append(chunk)

    def candidates(self, key: str, offset: Sequence[int], shape: Sequence[int]) -> Sequence[Chunk]:
        """All chunks that a rectangle may touch, and perhaps others."""
        count = self._num_leading[key]
        if any(size != 1 for size in shape[:count]):
            return self._tensors[key].chunks
        return self._by_prefix.get((key, tuple(offset[:count])), [])


def _candidates(entry: TensorStorageMetadata, index: Any) -> list[Any]:
    """The chunk at the index's hint, else all: searching thousands of chunks for each is quadratic."""
    hint = index.index
    is_right = (
        hint is not None
        and hint < len(entry.chunks)
        and tuple(entry.chunks[hint].offsets) == tuple(index.offset)
    )
    return [entry.chunks[hint]] if is_right else entry.chunks


def _intersection(
    chunk: Chunk, offset: Sequence[int], shape: Sequence[int]
) -> tuple[tuple[int, int], ...] | None:
    """[start, stop) per dimension in the whole tensor; None if they do not meet."""
    result = []
    for chunk_start, chunk_size, start, size in zip(chunk.offset, chunk.shape, offset, shape, strict=True):
        first, last = max(chunk_start, start), min(chunk_start + chunk_size, start + size)
        if first >= last:
            return None
        result.append((first, last))
    return tuple(result)


class _View(io.RawIOBase):
    """A part of a file as a file of its own, for torch.load, which then reads straight into the tensor."""

    def __init__(self, stream: io.FileIO, start: int, size: int) -> None:
        self._stream, self._start, self._size = stream, start, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")[: max(0, self._size - self._position)]
        self._stream.seek(self._start + self._position)
        count = self._stream.readinto(target) or 0
        self._position += count
        return count
