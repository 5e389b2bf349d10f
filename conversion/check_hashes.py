"""Verification, level 1: the files' and the tensors' hashes, and the tensors of the folder they came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from conversion.hf_rows import HfRows
from conversion.hf_source import HfSource
from conversion.manifest import Manifest, find_manifest, hash_rows, read_manifest
from conversion.plan import Unit
from conversion.to_hf import ToHf
from conversion.workers import check_jobs
from megatron_drpo.weights.hf_folder import HfFolder
from megatron_drpo.weights.integrity import INTEGRITY_FILE, hash_file, read_integrity


def check_files(folder: Path, *, num_workers: int) -> list[str]:
    """Every file of a checkpoint against the SHA-256 in integrity.json; problems as sentences."""
    names = read_integrity(folder)
    if names is None:
        return [f"{folder / INTEGRITY_FILE}: missing: nothing to compare the files with"]
    problems = [f"{folder / name}: missing" for name in names if not (folder / name).is_file()]
    problems += [
        f"{path}: not listed in {INTEGRITY_FILE}"
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in names and path.name != INTEGRITY_FILE
    ]
    present = [name for name in names if (folder / name).is_file()]

    def work(name: str, count: Callable[[int], None]) -> list[str]:
        same = hash_file(folder / name, count) == names[name]
        return [] if same else [f"{folder / name}: SHA-256 differs"]

    manifest = find_manifest(folder)
    if manifest is not None:
        problems += manifest.file_problems(folder)
    total = sum((folder / name).stat().st_size for name in present)
    return problems + check_jobs(present, work, total=total, num_workers=num_workers, title="files")


def check_tensors(
    checkpoint: ToHf, manifest: Manifest | None, source: HfSource | None, *, num_workers: int
) -> list[str]:
    """Every weight of a checkpoint, read anew, against hashes or against an HF folder; problems as sentences.

    Args:
        checkpoint: opened as if to be exported, without a cast.
        manifest: of the checkpoint; None: no hashes to compare with.
        source: the folder it should equal, read in its own dtypes; its values are cast to the checkpoint's.
    """

    def work(unit: Unit, count: Callable[[int], None]) -> list[str]:
        problems: list[str] = []
        for piece in unit.pieces:
            for name, row, rows in checkpoint.read_rows(piece):
                problem = None if manifest is None else manifest.problem(name, row, rows)
                if problem is not None:
                    problems.append(f"{checkpoint.reader.path}: {problem}")
                if source is not None:
                    expected = source.read_rows(name, row, len(rows)).to(rows.dtype)
                    if hash_rows(expected) != hash_rows(rows):
                        problems.append(
                            f"{checkpoint.reader.path}: tensor {name!r}, rows from {row} on: "
                            f"differs from {source.folder.path}"
                        )
            count(piece.num_bytes)
        return problems

    total = sum(unit.num_bytes for unit in checkpoint.units)
    return check_jobs(checkpoint.units, work, total=total, num_workers=num_workers, title="tensors")


def check_hf_folder(path: Path, *, num_workers: int) -> list[str]:
    """Every tensor of a converted HF folder against its hashes; problems as sentences.

    Raises:
        DrpoError: it was not converted by these tools, is damaged, or has other tensors than were written.
    """
    folder, manifest = HfFolder(path), read_manifest(path)
    tensors = {name: (folder.shape(name), folder.dtype(name)) for name in folder}
    manifest.check_tensors(path, tensors)
    stored = HfRows(folder, None)

    def work(name: str, count: Callable[[int], None]) -> list[str]:
        found: list[str] = []
        shape, dtype = tensors[name]
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        for row, num_rows, _ in manifest.hashes[name]:
            problem = manifest.problem(name, row, stored.read(name, row, num_rows))
            if problem is not None:
                found.append(f"{path / folder.info(name).shard}: {problem}")
            count(num_rows * row_bytes)
        return found

    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors.values())
    problems = check_jobs(list(tensors), work, total=total, num_workers=num_workers, title="tensors")
    return manifest.file_problems(path) + problems
