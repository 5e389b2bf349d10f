"""conversion.json: what a conversion wrote, with a hash for every tensor.

Hashes are of rows of HF tensors as they are in the output, whichever format that has: a conversion there and
back without a cast ends with the hashes it began with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from conversion.hf_target import as_bytes
from megatron_drpo.errors import CheckpointError

MANIFEST_FILE = "conversion.json"
_FORMAT_VERSION = 1
_ALGORITHM = "xxh3_128"


@dataclass(kw_only=True)
class Manifest:
    """Of one converted folder."""

    source: str
    """Name of the folder that was converted."""
    options: dict[str, Any]
    dtypes: dict[str, str]
    """HF tensor -> dtype in the output."""
    hashes: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    """HF tensor -> (first row, rows, XXH3-128 of their bytes), in order of the rows."""
    files: dict[str, str] = field(default_factory=dict)
    """config.json, tokenizer and the like, by path: XXH3-128."""
    algorithm: str = _ALGORITHM
    format_version: int = _FORMAT_VERSION

    def problem(self, name: str, row: int, rows: torch.Tensor) -> str | None:
        """What is wrong with rows [row, row + len(rows)) of a tensor; None if their hashes are right.

        Rows of which only a part was hashed together are not compared.
        """
        for first, count, digest in self.hashes.get(name, ()):
            start = first - row
            if start >= 0 and start + count <= len(rows) and hash_rows(rows[start : start + count]) != digest:
                rows_text = f"rows {first} to {first + count - 1}"
                return f"tensor {name!r}, {rows_text}: their hash is not the one in {MANIFEST_FILE}"
        return None

    def check_tensors(self, folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        """It speaks of exactly these tensors and of all their rows, so that none is read without its hash.

        Args:
            folder: for messages.
            tensors: HF name -> shape and dtype.

        Raises:
            CheckpointError: names what it lacks or has too much.
        """
        problems = [f"{name!r} is not in it" for name in tensors if name not in self.hashes]
        problems += [f"{name!r} is in it" for name in self.hashes if name not in tensors]
        for name, (shape, dtype) in tensors.items():
            row = 0
            for first, count, _ in self.hashes.get(name, ()):
                row = row + count if first == row and count > 0 else -1
            if name in self.hashes and row != shape[0]:
                problems.append(f"the hashes of {name!r} are not of rows 0 to {shape[0] - 1}")
            if self.dtypes.get(name) != str(dtype).removeprefix("torch."):
                problems.append(f"{name!r} is {dtype}, not {self.dtypes.get(name)}")
        if problems:
            shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
            raise CheckpointError(
                f"{folder / MANIFEST_FILE} is not of these weights: {'; '.join(shown)}. If they were changed "
                "on purpose, remove it"
            )

    def add_files(self, folder: Path, files: Iterable[Path]) -> None:
        """Note small files of the output."""
        for file in files:
            self.files[file.relative_to(folder).as_posix()] = _hash_file(file)

    def file_problems(self, folder: Path) -> list[str]:
        """Files that are not as they were written, as sentences."""
        problems: list[str] = []
        for name, digest in self.files.items():
            if not (folder / name).is_file():
                problems.append(f"{folder / name}: missing")
            elif _hash_file(folder / name) != digest:
                problems.append(f"{folder / name}: its hash is not the one in {MANIFEST_FILE}")
        return problems

    def add(self, name: str, row: int, num_rows: int, digest: str) -> None:
        self.hashes.setdefault(name, []).append((row, num_rows, digest))

    def write(self, folder: Path) -> None:
        """The rows of every tensor sorted, so that the order of the work does not show."""
        values = asdict(self)
        values["hashes"] = {name: sorted(self.hashes[name]) for name in sorted(self.hashes)}
        (folder / MANIFEST_FILE).write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def find_manifest(folder: Path) -> Manifest | None:
    """conversion.json of a folder; None if it has none.

    Raises:
        CheckpointError: it is not readable.
    """
    return read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else None


def read_manifest(folder: Path) -> Manifest:
    """conversion.json of a converted folder.

    Raises:
        CheckpointError: there is none, or it is not readable.
    """
    file = folder / MANIFEST_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
        manifest = Manifest(**values)
        _check_types(manifest)
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: missing: only what these tools converted has hashes to compare with"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from error
    if manifest.format_version != _FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {manifest.format_version}, this program reads {_FORMAT_VERSION}"
        )
    return manifest


def _check_types(manifest: Manifest) -> None:
    """Raise ValueError or TypeError if a field is not what it should be."""
    if manifest.algorithm != _ALGORITHM:
        raise ValueError(f"'algorithm' is {manifest.algorithm!r}, not {_ALGORITHM!r}")
    if not all(isinstance(field, dict) for field in (manifest.hashes, manifest.dtypes, manifest.files)):
        raise TypeError("'hashes', 'dtypes' and 'files' must be objects")
    for name, entries in manifest.hashes.items():
        for first, count, digest in entries:
            if not (type(first) is int and type(count) is int and type(digest) is str):
                raise TypeError(f"the hashes of {name!r} are not two integers and a text each")


def _hash_file(file: Path) -> str:
    return xxhash.xxh3_128(file.read_bytes()).hexdigest()


def hash_rows(rows: torch.Tensor) -> str:
    """XXH3-128 of a tensor's bytes, as 32 hexadecimal digits."""
    return xxhash.xxh3_128(as_bytes(rows)).hexdigest()
