"""Checkpoints of the whole run, and what resumes from them.

run_dir/checkpoints/
    latest, run_id          see checkpoint_folder.py
    step_000010/            torch_dist shards of model and optimizer (Megatron's dist_checkpointing)
        run_state.json      step, cursor, versions, metrics position, architecture
        rng.pt              one RNG state per rank
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_drpo.checkpoint_folder import (
    PARTIAL,
    RUN_STATE_FILE,
    CheckpointFolder,
    RunState,
    read_run_state,
)
from megatron_drpo.config import CheckpointConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.models.load_megatron import READ_ERRORS, describe_error
from megatron_drpo.policy.policy import Policy

_RNG = "rng.pt"
_WRITE_ERRORS = (OSError, RuntimeError, CheckpointingException, CheckpointException)
"""torch reports a full disk as RuntimeError, and what other ranks met as CheckpointException."""


class Checkpointer(CheckpointFolder):
    """Saves the checkpoints of one run, and resumes from them."""

    def find(self) -> Path | None:
        """The checkpoint to continue from: run_dir's latest, else `checkpoint.load_path`, else none.

        Collective: all ranks go by what global rank 0 sees, for a network file system may show them different
        states of `latest`. Where that is missing, the newest checkpoint of this run takes its place.

        Raises:
            CheckpointError: it is not complete, or run_dir holds checkpoints that may not be this run's.
        """
        found: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                found[0] = path = self.locate()
                if path is not None:
                    with _writing(path):
                        self.adopt(path)
            except CheckpointError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found, src=0)
        if found[1] is not None:
            raise CheckpointError(found[1])
        return found[0]

    def save(self, policy: Policy, state: RunState) -> Path:
        """Collective. Returns the new checkpoint's folder.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        final = self.folder / f"step_{state.step:06d}"
        partial = self.folder / f"{PARTIAL}{final.name}"
        is_main = policy.parallel.is_main
        if is_main:
            with _writing(final):
                for leftover in self.folder.glob(f"{PARTIAL}*"):
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
            state.run_id = self.run_id
            with _writing(final):
                torch.save(rng_states, partial / _RNG)
                state.files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                (partial / RUN_STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
                self.publish(partial, final)
        dist.barrier()
        return final

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


def _gather_rng_states() -> list[torch.Tensor]:
    """Every rank's torch RNG state, on rank 0. Training draws nothing from it today; user code may."""
    states: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(torch.get_rng_state(), states)
    return states or []


def _restore_rng_state(states: list[torch.Tensor]) -> None:
    """Per rank; under another number of ranks the states have no owner and are left out."""
    if len(states) == dist.get_world_size():
        torch.set_rng_state(states[dist.get_rank()])
