"""What a conversion will do, worked out before it starts: pieces of Megatron matrices, grouped into units.

A piece is a run of rows of one Megatron matrix; the mapping says which HF rows those are, so the same pieces
serve both directions. A unit is what one worker does at a time and what the journal records. Every row of
every matrix, and with it every row of every HF tensor, is in exactly one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_drpo.errors import ConversionError
from megatron_drpo.weights.fp8 import BLOCK
from megatron_drpo.weights.mapping import MegatronName, ParameterMapping, TensorMap

PIECE_ELEMENTS = 32 * 2**20
"""64 MiB in bf16. Not bytes: pieces, which hashes are of, must not depend on the dtype read or written."""
UNIT_BYTES = 512 * 2**20
"""By default."""


class Piece(NamedTuple):
    """Rows [start, stop) of a Megatron matrix, padding included."""

    name: MegatronName
    start: int
    stop: int
    num_bytes: int
    """As the target stores them; without scales of FP8."""


class HfRun(NamedTuple):
    """Consecutive rows of one HF tensor."""

    name: str
    row: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Pieces that one worker does in a row."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


def hf_runs(tensor_map: TensorMap, piece: Piece) -> list[HfRun]:
    """The HF rows of a piece: whole tensors if their rows interleave, else one run, or none of padding."""
    if tensor_map.num_groups > 1:
        return [HfRun(tensor.name, 0, tensor.shape[0]) for tensor in tensor_map.hf]
    return [HfRun(b.hf_name, b.hf_row, b.num_rows) for b in tensor_map.blocks(piece.start, piece.stop)]


def cut(
    tensor_map: TensorMap,
    num_rows: int,
    itemsize: int,
    *,
    may_cut: Callable[[int], bool] = lambda row: True,
    hf_multiple: int = 1,
) -> Iterator[Piece]:
    """Cut a matrix into pieces of at most PIECE_ELEMENTS where that is possible.

    Args:
        num_rows: of the matrix, padding included.
        itemsize: bytes of an element in the target.
        may_cut: whether there may be a cut before this row; between HF tensors and before the padding there
            always is one.
        hf_multiple: cuts lie at multiples of so many rows of an HF tensor.
    """
    row_elements = math.prod(tensor_map.shape[1:])
    if tensor_map.num_groups > 1:
        yield Piece(tensor_map.name, 0, num_rows, num_rows * row_elements * itemsize)
        return
    rows_per_piece = max(1, PIECE_ELEMENTS // row_elements)
    multiple = hf_multiple if rows_per_piece < BLOCK else BLOCK
    rows_per_piece = max(1, rows_per_piece // multiple) * multiple
    start = 0
    for end in _tensor_ends(tensor_map, num_rows):
        first_row = start
        while start < end:
            stop = min(end, start + rows_per_piece)
            while stop < end and not ((stop - first_row) % hf_multiple == 0 and may_cut(stop)):
                stop += 1
            yield Piece(tensor_map.name, start, stop, (stop - start) * row_elements * itemsize)
            start = stop


def _tensor_ends(tensor_map: TensorMap, num_rows: int) -> list[int]:
    ends: list[int] = []
    row = 0
    for tensor in tensor_map.hf:
        row += tensor.shape[0]
        ends.append(row)
    return ends if row == num_rows else [*ends, num_rows]


def group_into_units(pieces: Iterable[Piece], unit_bytes: int) -> tuple[Unit, ...]:
    """Consecutive pieces, together at most `unit_bytes` unless a single one is larger."""
    groups: list[list[Piece]] = []
    room = -1
    for piece in pieces:
        if piece.num_bytes > room:
            groups.append([])
            room = unit_bytes
        groups[-1].append(piece)
        room -= piece.num_bytes
    return tuple(Unit(index, tuple(group)) for index, group in enumerate(groups))


def check_coverage(
    units: Sequence[Unit], mapping: ParameterMapping, num_rows: Callable[[TensorMap], int]
) -> None:
    """Every row of every Megatron matrix and of every HF tensor is in exactly one piece.

    Raises:
        ConversionError: names the first matrix or tensor that is not: a defect of the plan, found before
            anything is written.
    """
    spans: dict[MegatronName, list[tuple[int, int]]] = {tensor_map.name: [] for tensor_map in mapping}
    hf_rows = dict.fromkeys(mapping.hf_shapes, 0)
    for unit in units:
        for piece in unit.pieces:
            spans[piece.name].append((piece.start, piece.stop))
            for run in hf_runs(mapping[piece.name], piece):
                hf_rows[run.name] += run.num_rows
    for tensor_map in mapping:
        row = 0
        for start, stop in sorted(spans[tensor_map.name]):
            if start != row:
                raise ConversionError(
                    f"plan: rows {row} to {start} of {tensor_map.name} are not covered once"
                )
            row = stop
        if row != num_rows(tensor_map):
            raise ConversionError(
                f"plan: {row} of {num_rows(tensor_map)} rows of {tensor_map.name} are covered"
            )
    for name, shape in mapping.hf_shapes.items():
        if hf_rows[name] != shape[0]:
            raise ConversionError(f"plan: {hf_rows[name]} of {shape[0]} rows of {name!r} are covered")
