"""What an update that failed leaves behind, to be computed again.

    run_dir/failures/step_000012/
        error.txt                 the message
        config.yaml               the run's configuration
        micro_batches/rank_N.pt   that rank's share of the update
        checkpoints/              weights, optimizer and random state before the update

`tools/replay_failure.py` reads it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState
from megatron_drpo.config.io import to_yaml
from megatron_drpo.config.schema import Config
from megatron_drpo.errors import CheckpointError, DrpoError
from megatron_drpo.policy.policy import Policy
from megatron_drpo.types import MicroBatch


def save_failure(
    config: Config, policy: Policy, state: RunState, micro_batches: list[MicroBatch], error: DrpoError
) -> Path:
    """Collective over all ranks, each of which gives its share of the update and the same error.

    Args:
        state: of the run before the step.

    Raises:
        CheckpointError: the folder cannot be written; it quotes `error`.
    """
    folder = failure_folder(config.run_dir, state.step + 1)
    try:
        _write(folder, config, policy, state, micro_batches, error)
    except (
        OSError,
        RuntimeError,
    ) as problem:  # a full disk is torch's RuntimeError, and so is CheckpointError
        raise CheckpointError(f"{error}; and what reproduces it could not be saved: {problem}") from problem
    dist.barrier()
    return folder


def _write(
    folder: Path,
    config: Config,
    policy: Policy,
    state: RunState,
    micro_batches: list[MicroBatch],
    error: DrpoError,
) -> None:
    rank = policy.parallel.rank
    (folder / "micro_batches").mkdir(parents=True, exist_ok=True)
    # Not asdict, which copies every tensor: replayed routes can be as large as all else.
    names = [field.name for field in dataclasses.fields(MicroBatch)]
    fields = [{name: getattr(one, name) for name in names} for one in micro_batches]
    torch.save(fields, folder / "micro_batches" / f"rank_{rank}.pt")
    if policy.parallel.is_main:
        (folder / "error.txt").write_text(f"{error}\n")
        (folder / "config.yaml").write_text(to_yaml(config))
    Checkpointer(str(folder), config.checkpoint).save(policy, state)


def failure_folder(run_dir: str | Path, step: int) -> Path:
    """Of step `step`, counted from 1 as everything a person sees."""
    return Path(run_dir) / "failures" / f"step_{step:06d}"


def load_failed_micro_batches(folder: str | Path, rank: int) -> list[MicroBatch]:
    """One rank's share of the update."""
    path = Path(folder) / "micro_batches" / f"rank_{rank}.pt"
    return [MicroBatch(**fields) for fields in torch.load(path, weights_only=True)]
