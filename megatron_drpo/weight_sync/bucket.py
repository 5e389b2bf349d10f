"""A stream of named tensors, packed into byte buffers of about the same size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

NamedTensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(slots=True)
class Bucket:
    """Some consecutive tensors of the stream, end to end without gaps in one uint8 buffer."""

    data: torch.Tensor
    """uint8 [size]"""
    names: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    is_last: bool = False
    """Of the stream."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the buffer."""
        start = 0
        for name, dtype, shape in zip(self.names, self.dtypes, self.shapes, strict=True):
            stop = start + shape.numel() * dtype.itemsize
            yield name, self.data[start:stop].view(dtype).view(shape)
            start = stop

    def smallest(self) -> Bucket:
        """Its smallest tensor alone, in the same memory; one that holds anything, if any does."""
        sizes = [s.numel() * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True)]
        index = min(range(len(sizes)), key=lambda i: sizes[i] or math.inf)
        start = sum(sizes[:index])
        data = self.data[start : start + sizes[index]]
        return Bucket(data, [self.names[index]], [self.dtypes[index]], [self.shapes[index]])


class BucketPacker:
    """Packs streams into two buffers in turn, which are allocated once.

    A bucket is valid until the next but one is asked for. A tensor larger than a buffer is a bucket of its
    own, without a copy.
    """

    def __init__(self, bucket_bytes: int, device: torch.device) -> None:
        self._bucket_bytes = bucket_bytes
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._num_packed = 0

    def pack(self, tensors: NamedTensors, *, wanted: Callable[[], bool] = lambda: True) -> Iterator[Bucket]:
        """Take the stream to its end, also once nobody wants the buckets: producing it is collective.

        Args:
            tensors: of any dtypes, on any device, whole.
            wanted: asked before each tensor; after it has said no, nothing is copied or yielded.
        """
        bucket = self._new_bucket()
        size = 0
        for name, tensor in tensors:
            if not wanted():
                continue
            # Receivers lay tensors end to end and view them: each must start at a multiple of its item size.
            fits = size + tensor.nbytes <= self._bucket_bytes and size % tensor.itemsize == 0
            if bucket.names and not fits:
                yield _closed(bucket, size)
                bucket = self._new_bucket()
                size = 0
            if tensor.nbytes > self._bucket_bytes:
                bucket.data = tensor.detach().to(self._device).contiguous().reshape(-1).view(torch.uint8)
            elif tensor.numel():
                place = bucket.data[size : size + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                place.copy_(tensor.detach())
            bucket.names.append(name)
            bucket.dtypes.append(tensor.dtype)
            bucket.shapes.append(tensor.shape)
            size += tensor.nbytes
        if bucket.names and wanted():
            bucket.is_last = True
            yield _closed(bucket, size)

    def release(self) -> None:
        """Give the buffers' memory back; the next stream allocates new ones."""
        self._buffers = []

    def _new_bucket(self) -> Bucket:
        turn = self._num_packed % 2
        self._num_packed += 1
        while len(self._buffers) <= turn:
            self._buffers.append(torch.empty(self._bucket_bytes, dtype=torch.uint8, device=self._device))
        return Bucket(self._buffers[turn])


def _closed(bucket: Bucket, size: int) -> Bucket:
    bucket.data = bucket.data[:size]
    return bucket
