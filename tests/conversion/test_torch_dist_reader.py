"""Rectangles of tensors, whatever chunks they were saved in, against torch's own distributed checkpoints."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from conversion.torch_dist_reader import Chunk, TorchDistReader
from conversion.torch_dist_writer import DataFile, GlobalTensor, write_common_state, write_metadata
from megatron_drpo.errors import CheckpointError
from megatron_drpo.weights.torch_dist import read_metadata

SHAPE = (3, 10, 8)


def cut_axis(size: int, cuts: list[int]) -> list[tuple[int, int]]:
    bounds = sorted({0, size, *cuts})
    return list(itertools.pairwise(bounds))


def write(folder: Path, tensor: torch.Tensor, cuts: list[list[int]]) -> TorchDistReader:
    """A checkpoint that holds one tensor in a grid of chunks."""
    spans = [cut_axis(size, at) for size, at in zip(tensor.shape, cuts, strict=True)]
    chunks = []
    with DataFile(folder / "__0_0.distcp") as data:
        for a in spans[0]:
            for b in spans[1]:
                for c in spans[2]:
                    part = tensor[slice(*a), slice(*b), slice(*c)].clone()
                    data.add(part)
                    offset = (a[0], b[0], c[0])
                    chunks.append((offset, tuple(part.shape), data.places[-1]))
    whole = GlobalTensor("x", tuple(tensor.shape), tensor.dtype)
    rows = [
        (whole, Chunk("x", offset, shape, "__0_0.distcp", position, size))
        for offset, shape, (position, size) in chunks
    ]
    write_metadata(folder, rows, ["x._extra_state/shard_0_1"])
    write_common_state(folder, {})
    return TorchDistReader(folder)


cuts_of = st.tuples(*(st.lists(st.integers(1, size - 1), max_size=3) for size in SHAPE))
rectangles = st.tuples(
    *(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True) for size in SHAPE)
)


@given(cuts=cuts_of, rectangle=rectangles)
def test_any_rectangle_of_any_chunks(
    tmp_path_factory: pytest.TempPathFactory, cuts: tuple[list[int], ...], rectangle: tuple[list[int], ...]
) -> None:
    tensor = torch.arange(240, dtype=torch.float32).view(SHAPE)
    reader = write(tmp_path_factory.mktemp("checkpoint"), tensor, list(cuts))
    spans = [sorted(bounds) for bounds in rectangle]
    found = reader.read("x", [a for a, _ in spans], [b - a for a, b in spans])
    assert torch.equal(found, tensor[tuple(slice(a, b) for a, b in spans)])


def test_torch_itself_reads_it(tmp_path: Path) -> None:
    tensor = torch.randn(SHAPE)
    write(tmp_path, tensor, [[1, 2], [4], [3]])
    target = {"x": torch.empty(SHAPE)}
    torch.distributed.checkpoint.load(target, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(target["x"], tensor)
    entry = read_metadata(tmp_path / ".metadata").state_dict_metadata["x"]
    assert isinstance(entry, TensorStorageMetadata)
    assert len(entry.chunks) == 12


def test_gaps_are_refused(tmp_path: Path) -> None:
    write(tmp_path, torch.zeros(SHAPE), [[1], [4], []])
    metadata = read_metadata(tmp_path / ".metadata")
    entry: Any = metadata.state_dict_metadata["x"]
    index = next(index for index in metadata.storage_data if index.offset == torch.Size((1, 4, 0)))
    del metadata.storage_data[index]
    entry.chunks = [chunk for chunk in entry.chunks if chunk.offsets != torch.Size((1, 4, 0))]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"tensor 'x' at \[1, 0, 0\]: 32 of 80 elements are stored"):
        TorchDistReader(tmp_path).read("x", (1, 0, 0), (1, 10, 8))


def test_metadata_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "opened"), "w")

    file = tmp_path / ".metadata"
    file.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"open does not belong into a checkpoint's metadata"):
        read_metadata(file)
    assert not (tmp_path / "opened").exists()
