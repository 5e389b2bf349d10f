"""A sharded Megatron model -> full HF-named tensors on global rank 0, a bucket at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from megatron_drpo.errors import ModelError
from megatron_drpo.weights.hf_folder import HfWriter
from megatron_drpo.weights.mapping import ParameterMapping
from megatron_drpo.weights.sharded import LocalShard, iter_local_shards

_POLL_S = 0.0002
TensorOf = Callable[[torch.Tensor], torch.Tensor]
"""A tensor of a parameter's shape that belongs to it, such as its gradient."""


class _Piece(NamedTuple):
    """A rectangle of an HF tensor that some rank sends."""

    hf_name: str
    rows: slice
    columns: tuple[slice, ...]
    num_elements: int


class _Source(NamedTuple):
    """Where this rank finds the values of a piece."""

    shard: LocalShard
    row: int
    num_rows: int

    def values(self, of: TensorOf | None = None) -> torch.Tensor:
        tensor = None if of is None else of(self.shard.parameter)
        return self.shard.rows(self.row, self.num_rows, tensor)


class HfExporter:
    """Gathers the current weights of a model, as often as wanted; the plan is made once.

    Rectangles with one main copy each go straight from their owners to global rank 0: per bucket one
    message per owner. Rank 0 never holds more than two buckets (or the largest single tensor twice).
    """

    def __init__(
        self, chunks: Sequence[GPTModel], mapping: ParameterMapping, *, bucket_bytes: int = 64 * 2**20
    ) -> None:
        """Make the plan; collective over all ranks.

        Args:
            chunks: this rank's bare models, one per virtual pipeline stage.
            mapping: of the model's family and architecture.
            bucket_bytes: tensors gathered together; a larger tensor is a bucket of its own.

        Raises:
            ModelError: on all ranks, if the ranks together do not hold exactly the model.
        """
        self._mapping = mapping
        self._dtype: torch.dtype = chunks[0].config.params_dtype
        self._device = next(chunks[0].parameters()).device
        self._rank = dist.get_rank()
        self._buckets = _split_into_buckets(mapping, bucket_bytes // self._dtype.itemsize)
        bucket_of = {name: i for i, names in enumerate(self._buckets) for name in names}
        self._sources: list[list[_Source]] = [[] for _ in self._buckets]
        pieces: list[list[_Piece]] = [[] for _ in self._buckets]
        for piece, source in _iter_owned(chunks, mapping):
            pieces[bucket_of[piece.hf_name]].append(piece)
            self._sources[bucket_of[piece.hf_name]].append(source)
        self._pieces_of_rank = self._gather_plan(pieces)

    def tensors(
        self, of: TensorOf | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every HF tensor of the model once, in the family's order; collective over all ranks.

        On global rank 0: (name, tensor) on the model's device. The other ranks yield nothing but must iterate
        to the end as well.

        Args:
            of: what to export of each parameter; None: its weights.
            dtype: everything is cast to it; None: the model's parameter dtype (also for an fp32 router of a
                bf16 model).
        """
        dtype = self._dtype if dtype is None else dtype
        for bucket in range(len(self._buckets)):
            if self._rank == 0:
                yield from self._receive(bucket, of, dtype).items()
            elif self._sources[bucket]:
                self._send(bucket, of, dtype)

    def save(self, path: str | Path, *, source: str | Path, overwrite: bool = False) -> None:
        """Write the weights as an HF folder, with the config and tokenizer of `source`; collective."""
        if self._rank != 0:
            for _ in self.tensors():
                pass
            return
        with HfWriter(path, source=source, overwrite=overwrite) as writer:
            for name, tensor in self.tensors():
                writer.add(name, tensor)

    def _gather_plan(self, pieces: list[list[_Piece]]) -> list[list[list[_Piece]]]:
        """Rank 0 learns what each rank sends: [rank][bucket] -> pieces; empty on other ranks."""
        gathered: list[list[list[_Piece]]] = [[] for _ in range(dist.get_world_size())]
        dist.gather_object(pieces, gathered if self._rank == 0 else None, dst=0)
        verdict = [_coverage_problem(gathered, self._mapping) if self._rank == 0 else None]
        dist.broadcast_object_list(verdict, src=0)
        if verdict[0] is not None:
            raise ModelError(verdict[0])
        return gathered if self._rank == 0 else []

    def _send(self, bucket: int, of: TensorOf | None, dtype: torch.dtype) -> None:
        flat = torch.cat([source.values(of).reshape(-1).to(dtype) for source in self._sources[bucket]])
        # NCCL allows a batch between some ranks of a group only after a collective of all: the plan's gather.
        _wait(dist.batch_isend_irecv([dist.P2POp(dist.isend, flat, 0)]))

    def _receive(self, bucket: int, of: TensorOf | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        flats: dict[int, torch.Tensor] = {}
        for rank, pieces_of_bucket in enumerate(self._pieces_of_rank[1:], 1):
            num_elements = sum(piece.num_elements for piece in pieces_of_bucket[bucket])
            if num_elements:
                flats[rank] = torch.empty(num_elements, dtype=dtype, device=self._device)
        operations = [dist.P2POp(dist.irecv, flat, rank) for rank, flat in flats.items()]
        works = dist.batch_isend_irecv(operations) if operations else []
        tensors = {
            name: torch.empty(self._mapping.hf_shapes[name], dtype=dtype, device=self._device)
            for name in self._buckets[bucket]
        }
        for piece, source in zip(self._pieces_of_rank[0][bucket], self._sources[bucket], strict=True):
            tensors[piece.hf_name][(piece.rows, *piece.columns)] = source.values(of)
        _wait(works)
        for rank, flat in flats.items():
            pieces = self._pieces_of_rank[rank][bucket]
            parts = flat.split([piece.num_elements for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                target = tensors[piece.hf_name][(piece.rows, *piece.columns)]
                target.copy_(part.view(target.shape))
        return tensors


def _wait(works: Sequence[dist.Work]) -> None:
    """For the transfers themselves.

    NCCL's `wait` holds up a stream only: the sender would go on, and hold the memory of all its buckets,
    whose time limits run from the moment they are queued, while the receiver is busy with the first.
    """
    for work in works:
        work.wait()
    for work in works:
        while not work.is_completed():
            time.sleep(_POLL_S)


def _split_into_buckets(mapping: ParameterMapping, max_elements: int) -> list[list[str]]:
    """Consecutive HF names, together at most `max_elements` unless a single one is larger."""
    buckets: list[list[str]] = []
    room = -1
    for name, shape in mapping.hf_shapes.items():
        num_elements = torch.Size(shape).numel()
        if num_elements > room:
            buckets.append([])
            room = max_elements
        buckets[-1].append(name)
        room -= num_elements
    return buckets


def _iter_owned(chunks: Sequence[GPTModel], mapping: ParameterMapping) -> Iterator[tuple[_Piece, _Source]]:
    """The rectangles of HF tensors whose main copy this rank holds."""
    for shard in iter_local_shards(chunks):
        tensor_map = mapping[shard.name]
        tensor_map.check_shape(shard.matrix_shape)
        if not shard.is_main:
            continue
        for block in tensor_map.blocks(shard.row, shard.row + shard.num_rows):
            source = _Source(shard, block.row, block.num_rows)
            rows = slice(block.hf_row, block.hf_row + block.num_rows)
            yield _Piece(block.hf_name, rows, shard.columns, source.values().numel()), source


def _coverage_problem(gathered: list[list[list[_Piece]]], mapping: ParameterMapping) -> str | None:
    """The first HF tensor that the ranks do not hold exactly once; None if all is well."""
    counts = dict.fromkeys(mapping.hf_shapes, 0)
    for pieces_of_bucket in gathered:
        for pieces in pieces_of_bucket:
            for piece in pieces:
                counts[piece.hf_name] += piece.num_elements
    for name, shape in mapping.hf_shapes.items():
        expected = torch.Size(shape).numel()
        if counts[name] != expected:
            return f"HF tensor {name!r}: all ranks together hold {counts[name]} of {expected} elements"
    return None
