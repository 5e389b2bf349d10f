"""Checkpoints of the whole run, and what resumes from them.

    run_dir/checkpoints/
        latest, run_id          see checkpoint/folder.py
        step_000010/            torch_dist shards of model and optimizer (Megatron's dist_checkpointing)
            run_state.json      step, cursor, versions, metrics position, architecture
            rng.pt              one RNG state per rank
            integrity.json      SHA-256 of every file

Each rank hashes the files with tensors while it writes them; a resume compares all files with their hashes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_drpo.checkpoint.folder import (
    PARTIAL,
    RUN_STATE_FILE,
    CheckpointFolder,
    RunState,
    read_run_state,
)
from megatron_drpo.config.schema import CheckpointConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.models.base import ArchitectureConfig
from megatron_drpo.policy.policy import Policy
from megatron_drpo.weights.integrity import (
    DATA_SUFFIX,
    INTEGRITY_FILE,
    HashingTransforms,
    check_description,
    hash_file,
    read_integrity,
    write_integrity,
)
from megatron_drpo.weights.load_megatron import READ_ERRORS, describe_error

_RNG = "rng.pt"
_PROGRESS_S = 10.0
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
            hashes = _save_hashed(tensors, partial)
        rng_states = _gather_rng_states()
        if is_main:
            state.optimizer_step = policy.optimizer_step
            state.num_updates = policy.num_updates
            state.architecture = asdict(policy.architecture)
            state.run_id = self.run_id
            with _writing(final):
                torch.save(rng_states, partial / _RNG)
                state.files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
                state.has_hashes = all(name in hashes for name in state.files if name.endswith(DATA_SUFFIX))
                (partial / RUN_STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")
                if state.has_hashes:
                    write_integrity(partial, hashes)
                self.publish(partial, final)
        dist.barrier()
        return final

    def load(
        self, path: Path, policy: Policy, show: Callable[[str], None] = lambda message: None
    ) -> RunState:
        """Collective. Puts weights, optimizer and RNG back, under this run's layout.

        Args:
            show: gets messages while the files are verified.

        Raises:
            CheckpointError: the checkpoint is damaged, or belongs to another model.
        """
        state = read_run_state(path)
        _check_architecture(path, state.architecture, asdict(policy.architecture))
        try:
            _check_files(path, state.files)
            if self.config.verify_on_load:
                _verify(path, state, show)
            wanted = policy.sharded_state(is_loading=True)
            loaded: Any = dist_checkpointing.load(wanted, str(path))
            rng_states = torch.load(path / _RNG, weights_only=True)
        except (CheckpointError, *READ_ERRORS) as error:
            raise CheckpointError(
                f"{path} cannot be read: {describe_error(error)}. {self.way_back(path)}"
            ) from error
        policy.load_state(loaded, optimizer_step=state.optimizer_step, num_updates=state.num_updates)
        _restore_rng_state(rng_states)
        return state


def check_checkpoint(run_dir: str, config: CheckpointConfig, architecture: ArchitectureConfig) -> list[str]:
    """Why the run could not continue from its checkpoint, before anything starts; empty if it can."""
    folder = CheckpointFolder(run_dir, config)
    try:
        path = folder.locate()
        if path is None:
            return []
        state = read_run_state(path)
        _check_architecture(path, state.architecture, asdict(architecture))
    except CheckpointError as error:
        return [str(error)]
    try:
        _check_files(path, state.files)
        if config.verify_on_load:
            _read_hashes(path, state)
            check_description(path)
    except CheckpointError as error:
        return [f"{path} cannot be read: {error}. {folder.way_back(path)}"]
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
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{name} has {file.stat().st_size} bytes, {size} were written")


def _read_hashes(path: Path, state: RunState) -> dict[str, str]:
    """File name -> SHA-256; empty for a checkpoint from before there were any."""
    listed = read_integrity(path)
    if listed is None and state.has_hashes:
        raise CheckpointError(f"{INTEGRITY_FILE} is missing")
    return listed or {}


def _verify(path: Path, state: RunState, show: Callable[[str], None]) -> None:
    """Compare the files with their hashes; each rank reads its part, and a problem of any ends all."""
    try:
        listed = _read_hashes(path, state)
        if not listed:
            show(f"{path} is from before checkpoints had hashes: its values are not verified")
        names = sorted(listed, key=lambda name: (-state.files.get(name, 0), name))  # parts of about one size
        names = names[dist.get_rank() :: dist.get_world_size()]
        progress = _Verified(sum(state.files.get(name, 0) for name in names), show)
        problems = [
            f"{name} has other content than was written: its SHA-256 is not the one in {INTEGRITY_FILE}"
            for name in names
            if hash_file(path / name, progress.add) != listed[name]
        ]
    except (CheckpointError, OSError) as error:
        problems = [str(error)]
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, problems)
    found = list(dict.fromkeys(problem for part in gathered for problem in part))
    if found:
        raise CheckpointError("; ".join(found[:20]))


class _Verified:
    """Says now and then how far the verification is."""

    def __init__(self, num_bytes: int, show: Callable[[str], None]) -> None:
        self._total = num_bytes
        self._done = 0
        self._show = show
        self._shown = time.monotonic()

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if time.monotonic() - self._shown > _PROGRESS_S:
            self._shown = time.monotonic()
            done, total = self._done / 1e9, self._total / 1e9
            self._show(f"verifying the checkpoint: {done:.1f} of this rank's {total:.1f} GB")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class _HashingStrategy(TorchDistSaveShardedStrategy):
    """Megatron's writer of the torch_dist format, whose files are hashed on their way."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)
        self.transforms = HashingTransforms([])

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *others: Any) -> Any:
        if hasattr(writer, "transforms"):  # torch >= 2.7
            self.transforms = HashingTransforms(name for _, name, _ in writer.write_buckets)
            writer.transforms = self.transforms
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *others)


def _save_hashed(tensors: dict[str, Any], folder: Path) -> dict[str, str]:
    """Collective. Write the tensors' files; on global rank 0 their names with their SHA-256, else nothing."""
    strategy = _HashingStrategy()
    computes_crc32 = torch.serialization.get_crc32_options()
    # Nothing reads the checksums in torch's archives, and they cost as much as the hashes.
    torch.serialization.set_crc32_options(False)
    try:
        dist_checkpointing.save(tensors, str(folder), strategy)
    finally:
        torch.serialization.set_crc32_options(computes_crc32)
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(strategy.transforms.digests(), gathered)
    return {name: digest for digests in gathered or [] for name, digest in digests.items()}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError as well, but not of the disk
        raise
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
