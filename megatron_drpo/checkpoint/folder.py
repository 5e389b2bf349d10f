"""Which checkpoint of a run is in force: the names in its folder, and what each checkpoint says of itself.

    run_dir/checkpoints/
        run_id                  text: which run this is; a run that starts over gets another
        latest                  text: the name of the newest complete checkpoint
        step_000010/            a checkpoint; `run_state.json` says which run's, and at which step

A checkpoint is written under a temporary name and renamed when complete; `latest` is replaced
atomically afterwards. A kill at any moment leaves the previous checkpoint in force. What is deleted gets a
temporary name first, so that every folder called `step_*` is complete. Where `latest` is missing, as after a
kill just before it is written for the first time, the newest one that carries the run's id is in force.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_drpo.config.schema import CheckpointConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.weights.torch_dist import read_pointer

RUN_STATE_FILE = "run_state.json"
PARTIAL = ".partial_"
"""How the name of a checkpoint begins that is not complete."""
_RUN_ID = "run_id"
_LATEST = "latest"
_FORMAT_VERSION = 1


@dataclass(kw_only=True)
class RunState:
    """Where a run stands between two steps."""

    step: int = 0
    """Steps done; the next one has this number."""
    policy_version: int = 0
    """Version of the current weights; the servers hold the same after every step."""
    num_updates: int = 0
    optimizer_step: int = 0
    metrics_position: int = 0
    """Bytes of metrics.jsonl that belong to the steps done."""
    cursor: dict[str, Any] = field(default_factory=dict)
    """The prompt source's state."""
    architecture: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    """Bytes of every other file of the checkpoint."""
    has_hashes: bool = False
    """There is an integrity.json; false in checkpoints from before they had one."""
    run_id: str = ""
    """Of the run that wrote it; empty in checkpoints from before runs had one."""
    format_version: int = _FORMAT_VERSION


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, run_dir: str, config: CheckpointConfig) -> None:
        self.config = config
        self.folder = Path(run_dir) / "checkpoints"
        self.run_id = ""
        """On global rank 0, from `claim` on."""

    def locate(self) -> Path | None:
        """The checkpoint to continue from, as this process sees it; None: there is none.

        Raises:
            CheckpointError: it is not complete, or run_dir holds checkpoints that may not be this run's.
        """
        if self.config.resume:
            own = self._latest() or self._newest_own()
            if own is not None:
                return own
        if self.config.load_path is None:
            return None
        path = Path(self.config.load_path)
        if not _is_complete(path):
            raise CheckpointError(
                f"{path} is not a complete checkpoint: start from another one with "
                "checkpoint.resume=false checkpoint.load_path=FOLDER"
            )
        return path

    def is_own(self, path: Path) -> bool:
        """It was written by the run in this run_dir."""
        return path.resolve().parent == self.folder.resolve()

    def claim(self) -> None:
        """The folder is this run's from here on. On global rank 0.

        With `checkpoint.resume=false` the run is a new one: checkpoints of earlier ones are not in force.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        try:
            if not self.config.resume:
                (self.folder / _LATEST).unlink(missing_ok=True)
            run_id = self._read_id() if self.config.resume else None
            if run_id is None:
                run_id = uuid.uuid4().hex
                self.folder.mkdir(parents=True, exist_ok=True)
                self._write_name(_RUN_ID, run_id)
            self.run_id = run_id
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error}") from error

    def adopt(self, path: Path) -> None:
        """Have `latest` name a checkpoint of the run that is resumed, if it is missing. On global rank 0."""
        if self.config.resume and self.is_own(path) and not os.path.lexists(self.folder / _LATEST):
            self._write_name(_LATEST, path.name)

    def publish(self, partial: Path, final: Path) -> None:
        """Give a finished checkpoint its name, put it in force and delete old ones. On global rank 0."""
        for file in partial.iterdir():
            _flush_to_disk(file)
        _flush_to_disk(partial)
        if final.exists():  # saved by a kill's victim or by an earlier run: `latest` does not name it
            self._delete(final)
        partial.rename(final)
        _flush_to_disk(self.folder)
        self._write_name(_LATEST, final.name)
        for folder in self._steps_until(final)[: -self.config.keep_last]:
            self._delete(folder)

    def _latest(self) -> Path | None:
        """What `latest` names; None if it is missing."""
        pointer = self.folder / _LATEST
        if not os.path.lexists(pointer):
            return None
        try:
            path = self.folder / read_pointer(pointer)
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {self._ways_out()}") from error
        if not _is_complete(path):
            raise CheckpointError(
                f"{path} is not a complete checkpoint, though {pointer} names it. {self._ways_out()}"
            )
        return path

    def _newest_own(self) -> Path | None:
        """The newest checkpoint with this run's id; None if there are no checkpoints at all."""
        run_id, own = self._read_id(), None
        foreign: list[str] = []
        unreadable: list[str] = []
        for path in _steps(self.folder).values():
            try:
                writer = read_run_state(path).run_id
            except CheckpointError as error:
                unreadable.append(str(error))
                continue
            if writer and writer == run_id:
                own = path
            else:
                foreign.append(f"{path} is of {'another run' if writer else 'a run without an id'}")
        problems = unreadable + (foreign if own is None else [])
        if problems:
            shown = problems[:3] + ([f"and {len(problems) - 3} more"] if len(problems) > 3 else [])
            raise CheckpointError(
                f"{self.folder / _LATEST} is missing: {'; '.join(shown)}. {self._ways_out()}"
            )
        return own

    def way_back(self, path: Path) -> str:
        """How to continue from a checkpoint before a damaged one, in a sentence."""
        names = [step.name for step in _steps(path.parent).values() if _is_complete(step)]
        older = names[: names.index(path.name)] if path.name in names else []
        if not older:
            return "There is no older checkpoint beside it"
        how = f"set checkpoint.load_path={path.parent / older[-1]}"
        if self.is_own(path):
            how = f"write {older[-1]} into {self.folder / _LATEST} and start the run again"
        return f"To go back to an older checkpoint ({', '.join(older)}), {how}"

    def _ways_out(self) -> str:
        names = ", ".join(path.name for path in _steps(self.folder).values() if _is_complete(path))
        pointer = self.folder / _LATEST
        go_on = f"To continue from one of {names}, write its name into {pointer}. " if names else ""
        return f"{go_on}To start over, take another run_dir, or checkpoint.resume=false, which replaces these"

    def _read_id(self) -> str | None:
        try:
            return read_pointer(self.folder / _RUN_ID)
        except CheckpointError:
            return None

    def _write_name(self, file: str, name: str) -> None:
        """Replace one of the folder's small files, as a whole or not at all."""
        new = self.folder / f".{file}"
        new.write_text(name + "\n")
        _flush_to_disk(new)
        new.replace(self.folder / file)
        _flush_to_disk(self.folder)

    def _steps_until(self, newest: Path) -> list[Path]:
        """Oldest first. Later ones are of a run before this one in the same folder: not ours to delete."""
        last = int(newest.name.removeprefix("step_"))
        return [path for step, path in _steps(self.folder).items() if step <= last]

    def _delete(self, folder: Path) -> None:
        shutil.rmtree(folder.rename(self.folder / f"{PARTIAL}deleted_{folder.name}"))


def read_run_state(path: Path) -> RunState:
    """run_state.json of a checkpoint folder.

    Raises:
        CheckpointError: not readable, or written by another format version.
    """
    file = path / RUN_STATE_FILE
    try:
        values = json.loads(file.read_text())
        version = values.pop("format_version")
        if version == _FORMAT_VERSION:
            state = RunState(**values)
            for name, value in asdict(RunState()).items():
                if type(getattr(state, name)) is not type(value):
                    raise TypeError(f"{name!r} is {getattr(state, name)!r}")
            return state
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    raise CheckpointError(f"{path}: format version {version}, this program reads {_FORMAT_VERSION}")


def _steps(folder: Path) -> dict[int, Path]:
    """By number, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = {int(match[1]): path for path in paths if (match := re.fullmatch(r"step_(\d+)", path.name))}
    return dict(sorted(steps.items()))


def _is_complete(path: Path) -> bool:
    return not path.name.startswith(PARTIAL) and (path / RUN_STATE_FILE).is_file()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
