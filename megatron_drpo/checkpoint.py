"""Checkpoints of the whole run, and what resumes from them.

    run_dir/checkpoints/
        latest                  text: the name of the newest complete checkpoint
        step_000010/            torch_dist shards of model and optimizer (Megatron's dist_checkpointing)
            run_state.json      step, cursor, versions, metrics position, architecture
            rng.pt              one RNG state per rank

A checkpoint is written under a temporary name and renamed when complete; `latest` is replaced
atomically afterwards. A kill at any moment leaves the previous checkpoint in force.
"""

from __future__ import annotations

import json
import os
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

from megatron_drpo.config import CheckpointConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.policy.policy import Policy

_RUN_STATE = "run_state.json"
_RNG = "rng.pt"
_PARTIAL = ".partial_"
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
    format_version: int = _FORMAT_VERSION


class Checkpointer:
    """Saves and finds the checkpoints of one run."""

    def __init__(self, run_dir: str, config: CheckpointConfig) -> None:
        self.config = config
        self.folder = Path(run_dir) / "checkpoints"

    def find(self) -> Path | None:
        """The checkpoint to continue from: run_dir's latest, else `checkpoint.load_path`, else none."""
        latest = self.folder / "latest"
        if self.config.resume and latest.is_file():
            path = self.folder / latest.read_text().strip()
        elif self.config.load_path is not None:
            path = Path(self.config.load_path)
        else:
            return None
        if not (path / _RUN_STATE).is_file():
            raise CheckpointError(f"{path} is not a complete checkpoint: {_RUN_STATE} is missing")
        return path

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
        with _writing(final):
            dist_checkpointing.save(policy.sharded_state(is_loading=False), str(partial))
        rng_states = _gather_rng_states()
        if is_main:
            state.optimizer_step = policy.optimizer_step
            state.num_updates = policy.num_updates
            state.architecture = asdict(policy.architecture)
            with _writing(final):
                torch.save(rng_states, partial / _RNG)
                (partial / _RUN_STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
                self._publish(partial, final)
        dist.barrier()
        return final

    def _publish(self, partial: Path, final: Path) -> None:
        for file in partial.iterdir():
            _flush_to_disk(file)
        _flush_to_disk(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        pointer = self.folder / ".latest"
        pointer.write_text(final.name + "\n")
        _flush_to_disk(pointer)
        pointer.replace(self.folder / "latest")
        _flush_to_disk(self.folder)
        for old in sorted(self.folder.glob("step_*"))[: -self.config.keep_last]:
            shutil.rmtree(old)

    def load(self, path: Path, policy: Policy) -> RunState:
        """Collective. Puts weights, optimizer and RNG back, under this run's layout.

        Raises:
            CheckpointError: the checkpoint is damaged, or belongs to another model.
        """
        state = read_run_state(path)
        _check_architecture(path, state.architecture, asdict(policy.architecture))
        try:
            loaded = dist_checkpointing.load(policy.sharded_state(is_loading=True), str(path))
        except (CheckpointingException, OSError, EOFError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        policy.load_state(loaded, optimizer_step=state.optimizer_step, num_updates=state.num_updates)
        _restore_rng_state(path / _RNG)
        return state


def read_run_state(path: Path) -> RunState:
    """run_state.json of a checkpoint folder.

    Raises:
        CheckpointError: not readable, or written by another format version.
    """
    try:
        values = json.loads((path / _RUN_STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path / _RUN_STATE} cannot be read: {error}") from error
    if values.get("format_version") != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {values.get('format_version')}, this program reads {_FORMAT_VERSION}"
        )
    return RunState(**values)


def _check_architecture(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    current = json.loads(json.dumps(current))
    differing = [key for key in sorted({*saved, *current}) if saved.get(key) != current.get(key)]
    if differing:
        details = ", ".join(f"{key}: {saved.get(key)} there, {current.get(key)} here" for key in differing)
        raise CheckpointError(f"{path} is a checkpoint of another model ({details})")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointingException) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


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


def _restore_rng_state(path: Path) -> None:
    """Per rank; under another number of ranks the states have no owner and are left out."""
    states = torch.load(path, weights_only=True)
    if len(states) == dist.get_world_size():
        torch.set_rng_state(states[dist.get_rank()])
