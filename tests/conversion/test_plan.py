"""How matrices are cut into pieces, and that nothing is left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion.plan import Piece, Unit, check_coverage, cut, group_into_units, hf_runs
from megatron_drpo.errors import ConversionError
from megatron_drpo.weights.mapping import (
    HfTensor,
    MegatronName,
    ParameterMapping,
    TensorMap,
    direct,
    gate_up,
    qkv,
)

NAME = MegatronName("decoder.layers.mlp.linear_fc1.weight", 0)
EMBEDDING = direct(MegatronName("embedding"), "embedding", (101, 4), padded=True)
FC1 = gate_up(NAME, "gate", "up", (300, 4))
QKV = qkv(MegatronName("qkv"), HfTensor("q", (8, 4)), HfTensor("k", (4, 4)), HfTensor("v", (4, 4)), 2)


def spans(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.start, piece.stop) for piece in pieces]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conversion.plan.PIECE_ELEMENTS", 500)


def test_cuts_lie_between_tensors_and_before_the_padding() -> None:
    """4 elements a row: 125 rows a piece."""
    assert spans(list(cut(EMBEDDING, 128, 2))) == [(0, 101), (101, 128)]
    assert spans(list(cut(FC1, 600, 2))) == [
        (0, 125),
        (125, 250),
        (250, 300),
        (300, 425),
        (425, 550),
        (550, 600),
    ]
    assert spans(list(cut(QKV, 16, 2))) == [(0, 16)]


def test_cuts_keep_to_blocks_and_to_stored_chunks() -> None:
    """FP8 blocks of 128 rows count from the HF tensor's first row; a chunk of rows 200 to 290 stays whole."""
    blocks = list(cut(FC1, 600, 2, hf_multiple=128))
    assert spans(blocks) == [(0, 128), (128, 256), (256, 300), (300, 428), (428, 556), (556, 600)]
    chunks = list(cut(FC1, 600, 2, may_cut=lambda row: not 200 < row < 290))
    assert spans(chunks)[:3] == [(0, 125), (125, 290), (290, 300)]


def test_pieces_do_not_depend_on_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a hash of one format's pieces could not be checked in the other."""
    monkeypatch.setattr("conversion.plan.PIECE_ELEMENTS", 4 * 300)
    tensor_map = direct(NAME, "hf", (1000, 4))
    expected = [(0, 256), (256, 512), (512, 768), (768, 1000)]
    for itemsize, multiple in [(1, 128), (2, 1), (4, 1)]:
        assert spans(list(cut(tensor_map, 1000, itemsize, hf_multiple=multiple))) == expected


@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 600),
    padding=st.integers(0, 300),
    multiple=st.sampled_from([1, 128]),
)
def test_every_row_is_in_one_piece(rows: int, columns: int, padding: int, multiple: int) -> None:
    tensor_map = direct(NAME, "hf", (rows, columns), padded=True)
    pieces = list(cut(tensor_map, rows + padding, 2, hf_multiple=multiple))
    mapping = ParameterMapping([tensor_map])
    check_coverage(group_into_units(pieces, 5000), mapping, lambda _: rows + padding)
    runs = [run for piece in pieces for run in hf_runs(tensor_map, piece)]
    assert [run.row for run in runs] == [piece.start for piece in pieces if piece.start < rows]
    assert sum(run.num_rows for run in runs) == rows


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([(0, 300), (300, 590)], "590 of 600 rows"),
        ([(0, 300), (310, 600)], "rows 300 to 310"),
        ([(0, 300), (290, 600)], "rows 300 to 290"),
    ],
)
def test_gaps_and_overlaps_are_refused(wrong: list[tuple[int, int]], message: str) -> None:
    pieces = tuple(Piece(NAME, start, stop, 0) for start, stop in wrong)
    with pytest.raises(ConversionError, match=message):
        check_coverage([Unit(0, pieces)], ParameterMapping([FC1]), lambda _: 600)


def test_units_are_filled_in_order() -> None:
    pieces = [Piece(NAME, i, i + 1, size) for i, size in enumerate([60, 30, 20, 200, 10])]
    units = group_into_units(pieces, 100)
    assert [[piece.num_bytes for piece in unit.pieces] for unit in units] == [[60, 30], [20], [200], [10]]


def test_runs_of_interleaved_rows_are_whole_tensors() -> None:
    tensor_map: TensorMap = QKV
    (piece,) = cut(tensor_map, 16, 2)
    assert [tuple(run) for run in hf_runs(tensor_map, piece)] == [("q", 0, 8), ("k", 0, 4), ("v", 0, 4)]
