"""The unfinished output of a conversion: a hidden folder beside the target, and a journal.

    .NAME.converting          becomes NAME at the very end
    .NAME.converting.jsonl    line 1: what is converted and how; then a line per finished unit

A unit's line is appended when its bytes are on the disk, so whatever ends the program, the same command goes
on after the last line. The target's name never holds half a model. A journal without the folder is
that of a conversion that got its name and was killed before it had tidied up.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

from megatron_drpo.errors import ConversionError
from megatron_drpo.weights.hf_folder import replace_folder, replaced_path

_PUBLISHED = {"published": True}
"""The journal's last line, written just before the content gets its name."""
_LOCK_TIMEOUT_S = 10.0
"""The workers of a killed run end a moment after it."""


class Workspace:
    """Use it in a `with` block; an error inside leaves all that is needed to go on."""

    def __init__(
        self,
        target: Path,
        description: dict[str, Any],
        num_bytes: int,
        *,
        sources: Sequence[Path] = (),
        overwrite: bool = False,
        restart: bool = False,
    ) -> None:
        """
        Args:
            target: the folder to create.
            description: what is converted and how, as JSON; only the same conversion can be continued.
            num_bytes: of all output; must be free on the disk.
            sources: folders that are read: the target must not replace them.
            overwrite: an existing target is replaced, at the end.
            restart: discard an unfinished conversion.

        Raises:
            ConversionError: the target exists, another conversion is unfinished there or still running, the
                folder cannot be written, or the disk is too full.
        """
        target = Path(os.path.abspath(target))  # gives `.` a name
        for source in sources:
            if target.resolve() in (source.resolve(), *source.resolve().parents):
                raise ConversionError(f"{target} is or holds {source}, which is read: choose another folder")
        self.target = target
        self.content = target.with_name(f".{target.name}.converting")
        self._journal_file = target.with_name(f".{target.name}.converting.jsonl")
        self.done: dict[int, dict[str, Any]] = {}
        """Finished units and their records."""
        self.is_published = False
        """An earlier run has done all but to tidy up."""
        self._header = {"conversion": _fingerprint(description)}
        self._num_bytes = num_bytes
        self._overwrite = overwrite
        self._restart = restart
        self._journal: IO[str] | None = None

    def __enter__(self) -> Self:
        if not self._journal_file.exists():
            self._check_target()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._journal = _open_locked(self._journal_file)
        except OSError as error:
            raise ConversionError(f"{self._journal_file} cannot be written: {error.strerror}") from error
        try:
            self._read_journal(self._journal)
            if not self.is_published:
                self._check_space()
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._journal is not None:
            self._journal.close()
        if isinstance(error, OSError):
            raise ConversionError(
                f"{error.filename or self.content}: {error.strerror}; what is done is kept: mend it and "
                "repeat the command"
            ) from error

    @property
    def num_bytes_done(self) -> int:
        return sum(record["num_bytes"] for record in self.done.values())

    def record(self, unit: int, record: dict[str, Any]) -> None:
        """Note a unit whose bytes are on the disk."""
        self._append({"unit": unit, **record})
        self.done[unit] = record

    def check_unchanged(self, description: dict[str, Any]) -> None:
        """The input is still what it was at the start.

        Raises:
            ConversionError: it is not, so units of before and after may differ.
        """
        if self._header != {"conversion": _fingerprint(description)}:
            raise ConversionError(
                f"{self.target}: the input changed while it was converted: begin again with --restart"
            )

    def publish(self) -> None:
        """Give the finished content its name."""
        if not self.is_published:
            flush_folder(self.content)
            self._append(_PUBLISHED)
            replace_folder(self.content, self.target)
            flush_path(self.target.parent)
        shutil.rmtree(replaced_path(self.target), ignore_errors=True)
        self._journal_file.unlink(missing_ok=True)

    def _check_target(self) -> None:
        if os.path.lexists(self.target) and (self.target.is_symlink() or not self.target.is_dir()):
            kind = "a link" if self.target.is_symlink() else "a file"
            raise ConversionError(f"{self.target} is {kind}, not a folder: remove it, or choose another name")
        if self.target.exists() and not self._overwrite:
            raise ConversionError(
                f"{self.target}: exists already; choose another folder, or replace it with --overwrite"
            )

    def _append(self, line: dict[str, Any]) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def _read_journal(self, journal: IO[str]) -> None:
        journal.seek(0)
        lines = journal.read().split("\n")[:-1]  # what a kill cut off has no line end
        journal.truncate(sum(len(line.encode()) + 1 for line in lines))
        found = self._parse(lines)
        is_same = found[:1] == [self._header]
        if found and not self.content.exists():
            has_name = found[-1] == _PUBLISHED and self.target.exists()
            self.is_published = is_same and has_name and not self._restart
            found.clear()
        if self.is_published:
            return
        if not found and self.target.exists() and not self._overwrite:
            self._journal_file.unlink()
        self._check_target()
        if found and not is_same and not self._restart:
            raise ConversionError(
                f"{self.content} holds an unfinished conversion of other input or with other options: "
                "repeat that command to finish it, or discard it with --restart"
            )
        if not found or self._restart:
            self._start(journal)
        else:
            self.done = {line.pop("unit"): line for line in found[1:] if line != _PUBLISHED}

    def _parse(self, lines: list[str]) -> list[dict[str, Any]]:
        try:
            found = [json.loads(line) for line in lines]
            if all(isinstance(line, dict) for line in found):
                return found
        except ValueError:
            pass
        if self._restart:
            return []
        raise ConversionError(
            f"{self._journal_file}: damaged: discard the unfinished conversion with --restart"
        )

    def _start(self, journal: IO[str]) -> None:
        """In this order: a journal never speaks of content that is gone."""
        journal.truncate(0)
        if self.content.exists():
            shutil.rmtree(self.content)
        self.content.mkdir()
        self._append(self._header)

    def _check_space(self) -> None:
        needed = self._num_bytes - self.num_bytes_done
        free = shutil.disk_usage(self.content).free
        if free < needed:
            raise ConversionError(
                f"{self.content}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free on this disk"
            )


def _fingerprint(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _open_locked(file: Path) -> IO[str]:
    """The journal, for this process alone."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        journal = file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            journal.close()
            if time.monotonic() > deadline:
                raise ConversionError(f"{file}: another conversion to this target is running") from None
            time.sleep(0.1)
            continue
        except OSError:  # a file system without locks
            return journal
        # The one who had it before removes it when done: then this is a file without a name.
        if file.exists() and os.path.samestat(os.fstat(journal.fileno()), file.stat()):
            return journal
        journal.close()


def start_writeback(descriptor: int, position: int, num_bytes: int) -> None:
    """Have the disk write these bytes while more are made, so that fsync finds little left to do."""
    # Linux starts to write what it is asked to drop from its cache.
    os.posix_fadvise(descriptor, position, num_bytes, os.POSIX_FADV_DONTNEED)


def flush_folder(folder: Path) -> None:
    """Have everything in a folder on the disk."""
    for path in sorted(folder.rglob("*")):
        flush_path(path)
    flush_path(folder)


def flush_path(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
