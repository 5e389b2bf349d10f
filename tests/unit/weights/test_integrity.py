"""The list of a checkpoint's files: what is hashed on its way is not read, and what was damaged is named."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from megatron_drpo.errors import CheckpointError
from megatron_drpo.weights.integrity import (
    HashingTransforms,
    check_description,
    hash_file,
    read_integrity,
    write_integrity,
)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_items(transforms: HashingTransforms, file: Path, tensors: list[torch.Tensor]) -> None:
    """As DCP's writer does: one archive after the other, through a stream of its own."""
    with file.open("wb") as raw:
        for tensor in tensors:
            stream, to_undo = transforms.transform_save_stream(None, raw)
            assert to_undo == []
            torch.save(tensor, stream)  # pyrefly: ignore
            stream.close()


@pytest.mark.parametrize("forked", [False, True])
def test_files_are_hashed_on_their_way(tmp_path: Path, forked: bool) -> None:
    files = [tmp_path / "__0_0.distcp", tmp_path / "__0_1.distcp"]
    transforms = HashingTransforms(file.name for file in files)
    for number, file in enumerate(files):
        tensors = [torch.arange(10 + number), torch.zeros(30_000), torch.ones(2, 3).bfloat16()]
        if forked:
            writer = multiprocessing.get_context("fork").Process(
                target=write_items, args=(transforms, file, tensors)
            )
            writer.start()
            writer.join()
            assert writer.exitcode == 0
        else:
            write_items(transforms, file, tensors)
    assert transforms.digests() == {file.name: sha256(file) for file in files}


def test_known_hashes_are_not_computed_again(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("small.json", "large.distcp"):
        (tmp_path / name).write_text("{}")
    for _ in range(2):  # the list does not list itself
        write_integrity(tmp_path, {"large.distcp": "known"})
        assert read_integrity(tmp_path) == {
            "large.distcp": "known",
            "small.json": hashlib.sha256(b"{}").hexdigest(),
        }


def test_a_file_is_hashed_block_by_block(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(2_500_000))
    counted: list[int] = []
    assert hash_file(file, counted.append) == sha256(file)
    assert sum(counted) == 2_500_000
    assert max(counted) == 2**20


def test_a_damaged_list_or_description_is_named(tmp_path: Path) -> None:
    assert read_integrity(tmp_path) is None
    check_description(tmp_path)
    (tmp_path / "common.pt").write_bytes(b"abc")
    (tmp_path / "__0_0.distcp").write_bytes(b"abc")
    write_integrity(tmp_path, {})
    check_description(tmp_path)
    (tmp_path / "__0_0.distcp").write_bytes(b"abd")
    check_description(tmp_path)
    (tmp_path / "common.pt").write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=r"common\.pt: damaged"):
        check_description(tmp_path)
    (tmp_path / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common\.pt: missing"):
        check_description(tmp_path)
    for text in ("{", "[]", json.dumps({"algorithm": "md5", "files": {}})):
        (tmp_path / "integrity.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"integrity\.json: damaged"):
            check_description(tmp_path)
