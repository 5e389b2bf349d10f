"""Checkpoints of the whole run, and what resumes from them.

    run_dir/checkpoints/
        latest                  text: the name of the newest complete checkpoint
        step_000010/            torch_dist shards of model and optimizer (Megatron's dist_checkpointing)
            run_state.json      step, cursor, versions, metrics position, architecture
            rng.pt              one RNG state per rank

A checkpoint is written under a temporary name and renamed when complete; `latest` is replaced
atomically afterwards. A kill at any moment leaves the previous checkpoint in force. What is deleted gets a
temporary name first, so that every folder called `step_*` is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_drpo.config import CheckpointConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.load_megatron import READ_ERRORS, describe_error
from megatron_drpo.policy.policy import Policy

_RUN_STATE = "run_state.json"
_RNG = "rng.pt"
_PARTIAL = ".partial_"
_FORMAT_VERSION = 1
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointingException, CheckpointException)
"""torch reports a full disk as RuntimeError, and what other ranks met as CheckpointException."""


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
    format_version: int = _FORMAT_VERSION


class Checkpointer:
    """Saves and finds the checkpoints of one run."""

    def __init__(self, run_dir: str, config: CheckpointConfig) -> None:
        self.config = config
        self.folder = Path(run_dir) / "checkpoints"

    def find(self) -> Path | None:
        """The checkpoint to continue from: run_dir's latest, else `checkpoint.load_path`, else none.

        Collective: all ranks go by what global rank 0 sees, for a network file system may show them different
        states of `latest`.

        Raises:
            CheckpointError: it is not complete.
        """
        found = [self.locate() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def locate(self) -> Path | None:
        """What `find` returns, as this process sees it."""
        latest = self.folder / "latest"
        if self.config.resume and latest.is_file():
            path = self.folder / latest.read_text().strip()
        elif self.config.load_path is not None:
            path = Path(self.config.load_path)
        else:
            return None
        if path.name.startswith(_PARTIAL) or not (path / _RUN_STATE).is_file():
            raise CheckpointError(
                f"{path} is not a complete checkpoint: start from another one with "
                "checkpoint.resume=false checkpoint.load_path=FOLDER"
            )
        return path

    def is_own(self, path: Path) -> bool:
        """It was written by the run in this run_dir."""
        return path.resolve().parent == self.folder.resolve()

    def withdraw_latest(self) -> None:
        """The run starts anew, so an earlier one's checkpoint is no longer in force. On global rank 0."""
        (self.folder / "latest").unlink(missing_ok=True)

    def save(self, policy: Policy, state: RunState) -> Path:
        """Collective. Returns the new checkpoint's folder.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        final = self.folder / f"step_{state.step:06d}"
        partial = self.folder / f"{_PARTIAL}{final.name}"
        is_main = policy.parallel.is_main
        if is_main:
            with _writing(final):
                for leftover in self.folder.glob(f"{_PARTIAL}*"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
        dist.barrier()
        tensors = policy.sharded_state(is_loading=False)
        with _writing(final):
            dist_checkpointing.save(tensors, str(partial))
        rng_states = _gather_rng_states()
        if is_main:
            state.optimizer_step = policy.optimizer_step
            state.num_updates = policy.num_updates
            state.architecture = asdict(policy.architecture)
            with _writing(final):
                torch.save(rng_states, partial / _RNG)
                state.files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                (partial / _RUN_STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
                self._publish(partial, final)
        dist.barrier()
        return final

    def _publish(self, partial: Path, final: Path) -> None:
        for file in partial.iterdir():
            _flush_to_disk(file)
        _flush_to_disk(partial)
        if final.exists():  # saved by a kill's victim or by an earlier run: `latest` does not name it
            self._delete(final)
        partial.rename(final)
        _flush_to_disk(self.folder)
        pointer = self.folder / ".latest"
        pointer.write_text(final.name + "\n")
        _flush_to_disk(pointer)
        pointer.replace(self.folder / "latest")
        _flush_to_disk(self.folder)
        for folder in self._steps_until(final)[: -self.config.keep_last]:
            self._delete(folder)

    def _steps_until(self, newest: Path) -> list[Path]:
        """Oldest first. Later ones are of a run before this one in the same folder: not ours to delete."""
        steps = {
            int(match[1]): path
            for path in self.folder.iterdir()
            if (match := re.fullmatch(r"step_(\d+)", path.name))
        }
        last = int(newest.name.removeprefix("step_"))
        return [steps[step] for step in sorted(steps) if step <= last]

    def _delete(self, folder: Path) -> None:
        shutil.rmtree(folder.rename(self.folder / f"{_PARTIAL}deleted_{folder.name}"))

    def load(self, path: Path, policy: Policy) -> RunState:
        """Collective. Puts weights, optimizer and RNG back, under this run's layout.

        Raises:
            CheckpointError: the checkpoint is damaged, or belongs to another model.
        """
        state = read_run_state(path)
        _check_architecture(path, state.architecture, asdict(policy.architecture))
        _check_files(path, state.files)
        wanted = policy.sharded_state(is_loading=True)
        try:
            loaded: Any = dist_checkpointing.load(wanted, str(path))
            rng_states = torch.load(path / _RNG, weights_only=True)
        except READ_ERRORS as error:
            raise CheckpointError(f"{path} cannot be read: {describe_error(error)}") from error
        policy.load_state(loaded, optimizer_step=state.optimizer_step, num_updates=state.num_updates)
        _restore_rng_state(rng_states)
        return state


def check_checkpoint(run_dir: str, config: CheckpointConfig, architecture: ArchitectureConfig) -> list[str]:
    """Why the run could not continue from its checkpoint, before anything starts; empty if it can."""
    try:
        path = Checkpointer(run_dir, config).locate()
        if path is not None:
            state = read_run_state(path)
            _check_architecture(path, state.architecture, asdict(architecture))
            _check_files(path, state.files)
    except CheckpointError as error:
        return [str(error)]
    return []


def read_run_state(path: Path) -> RunState:
    """run_state.json of a checkpoint folder.

    Raises:
        CheckpointError: not readable, or written by another format version.
    """
    file = path / _RUN_STATE
    try:
        values = json.loads(file.read_text())
        version = values.pop("format_version")
        if version == _FORMAT_VERSION:
            return RunState(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    raise CheckpointError(f"{path}: format version {version}, this program reads {_FORMAT_VERSION}")


def _check_architecture(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    there, here = _flatten(saved), _flatten(json.loads(json.dumps(current)))
    differing = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if differing:
        details = ", ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differing)
        raise CheckpointError(f"{path} is a checkpoint of another model ({details})")


def _check_files(path: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} cannot be read: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{path} cannot be read: {name} has {file.stat().st_size} bytes, {size} were written"
            )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except _WRITE_ERRORS as error:
        raise CheckpointError(
            f"{path} cannot be written: {describe_error(error)} (check free space and permissions there)"
        ) from error


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gather_rng_states() -> list[torch.Tensor]:
    """Every rank's torch RNG state, on rank 0. Training draws nothing from it today; user code may."""
    states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(torch.get_rng_state(), states)
    return states or []


def _restore_rng_state(states: list[torch.Tensor]) -> None:
    """Per rank; under another number of ranks the states have no owner and are left out."""
    if len(states) == dist.get_world_size():
        torch.set_rng_state(states[dist.get_rank()])
