"""integrity.json: Megatron's list of a checkpoint's files and their SHA-256.

megatron-core >= 0.19 compares all of them in `load(verify_integrity=True)`. Converted checkpoints have it,
and a run's own: what is large is hashed while it is written, so that nobody reads it again.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_drpo.errors import CheckpointError

INTEGRITY_FILE = "integrity.json"
DATA_SUFFIX = ".distcp"
"""Of the files that hold tensors."""

_BLOCK_BYTES = 2**20
_DIGEST_BYTES = hashlib.sha256().digest_size


def read_integrity(folder: Path) -> dict[str, str] | None:
    """File name -> SHA-256 in hexadecimal digits; None if the checkpoint has no such list.

    Raises:
        CheckpointError: it is damaged.
    """
    file = folder / INTEGRITY_FILE
    try:
        values = json.loads(file.read_text("utf-8"))
        if values["algorithm"] != "sha256":
            raise ValueError(f"'algorithm' is {values['algorithm']!r}")
        return {str(name): str(digest) for name, digest in values["files"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged: {error!r}") from error


def check_description(folder: Path) -> None:
    """Compare all but the tensors' files with integrity.json, if the checkpoint has one: a few megabytes.

    Raises:
        CheckpointError: names the files that are missing or differ.
    """
    listed = read_integrity(folder)
    if listed is None:
        return
    problems: list[str] = []
    for name, digest in listed.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{file}: missing, but {INTEGRITY_FILE} names it")
        elif file.suffix != DATA_SUFFIX and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            problems.append(f"{file}: damaged: its SHA-256 is not the one in {INTEGRITY_FILE}")
    if problems:
        raise CheckpointError("; ".join(problems[:20]))


def write_integrity(folder: Path, known: Mapping[str, str]) -> None:
    """List the files in `folder` itself.

    Args:
        known: file name -> SHA-256 of large files that need not be read again.
    """
    files = {
        file.name: known.get(file.name) or hash_file(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != INTEGRITY_FILE
    }
    content = json.dumps({"algorithm": "sha256", "files": files}, indent=2)
    (folder / INTEGRITY_FILE).write_text(content + "\n", "utf-8")


def hash_file(file: Path, count: Callable[[int], object] = lambda num_bytes: None) -> str:
    """SHA-256 of a file, read in blocks.

    Args:
        count: called with the bytes of each block.
    """
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            count(len(block))
    return digest.hexdigest()


class HashingTransforms:
    """Hashes the files that DCP's writer writes; takes the place of its `transforms`, and changes nothing.

    The writer appends one item after the other to each file, in forked processes or in threads: the digests
    lie in memory that all of them share.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """
        Args:
            names: of the files, without folders.
        """
        self._hashes = {name: hashlib.sha256() for name in names}
        self._slots = {name: _DIGEST_BYTES * index for index, name in enumerate(self._hashes)}
        self._digests = mmap.mmap(-1, max(1, _DIGEST_BYTES * len(self._slots)))

    def transform_save_stream(self, _: object, raw_stream: Any) -> tuple[_HashingStream, list[str]]:
        """Called by the writer for each item: where to write it, and what a reader must undo (nothing)."""
        name = Path(raw_stream.name).name
        return _HashingStream(raw_stream, self._hashes[name], self._digests, self._slots[name]), []

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file in hexadecimal digits, once all are written."""
        return {name: self._digests[at : at + _DIGEST_BYTES].hex() for name, at in self._slots.items()}


class _HashingStream:
    """One item on its way into a file."""

    def __init__(self, raw: Any, digest: Any, digests: mmap.mmap, slot: int) -> None:
        self._raw = raw
        self._digest = digest
        self._digests = digests
        self._slot = slot

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self._digest.update(view)
        return self._raw.write(view)

    def flush(self) -> None:
        self._raw.flush()

    def close(self) -> None:
        """The end of the item, not of the file."""
        self._digests[self._slot : self._slot + _DIGEST_BYTES] = self._digest.digest()
