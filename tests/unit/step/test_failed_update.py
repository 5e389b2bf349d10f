"""A failed update, saved and computed again from what was saved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState
from megatron_drpo.config.schema import Config, DataConfig, Dtype, OptimizerConfig, PolicyConfig
from megatron_drpo.errors import CheckpointError, NumericsError
from megatron_drpo.metrics.timing import StepTimer
from megatron_drpo.platform.base import Platform
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.policy.policy import Policy
from megatron_drpo.step.failed_update import failure_folder, load_failed_micro_batches, save_failure
from megatron_drpo.step.global_batch import iter_global_batches
from megatron_drpo.types import MicroBatch, TrainSequence

ROOT = Path(__file__).parents[3]


def same(first: MicroBatch, second: MicroBatch) -> bool:
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in fields(MicroBatch)]
    return all(
        torch.equal(a.nan_to_num(5.0), b.nan_to_num(5.0)) if isinstance(a, torch.Tensor) else a == b
        for a, b in pairs
    )


def test_a_folder_that_cannot_be_written_hides_nothing(
    cpu_platform: Platform,
    one_rank: ParallelState,
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    tmp_path: Path,
) -> None:
    """The error still says what was not finite, besides where it could not be saved."""
    (tmp_path / "failures").write_text("in the way")
    config = Config(
        run_dir=str(tmp_path),
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=str(hf_model("moe")), dtype=Dtype.fp32),
    )
    policy = Policy(config, cpu_platform, one_rank)
    (micro_batches,) = iter_global_batches(config, policy, make_sequences([8]))
    error = NumericsError("update 7: loss nan")
    with pytest.raises(CheckpointError) as caught:
        save_failure(config, policy, RunState(step=6), micro_batches, error)
    assert str(caught.value).startswith("update 7: loss nan; and what reproduces it could not be saved: ")
    assert str(failure_folder(tmp_path, 7)) in str(caught.value)


def test_the_saved_update_fails_again_in_the_same_place(
    cpu_platform: Platform,
    one_rank: ParallelState,
    hf_model: Callable[[str], Path],
    make_sequences: Callable[..., list[TrainSequence]],
    tmp_path: Path,
) -> None:
    config = Config(
        run_dir=str(tmp_path),
        data=DataConfig(train_path="unused"),
        policy=PolicyConfig(model_path=str(hf_model("moe")), dtype=Dtype.fp32),
        optimizer=OptimizerConfig(lr=1e-2),
    )
    policy = Policy(config, cpu_platform, one_rank)
    (good,) = iter_global_batches(config, policy, make_sequences([8, 15]))
    policy.train_step(good, StepTimer())  # the weights and Adam's moments are no longer the initial ones
    sequences = make_sequences([9, 14, 4])
    sequences[2].advantages[1] = torch.nan
    (bad,) = iter_global_batches(config, policy, sequences)
    with pytest.raises(NumericsError) as first:
        policy.train_step(bad, StepTimer())

    folder = save_failure(config, policy, RunState(step=6), bad, first.value)
    assert folder == failure_folder(tmp_path, 7)
    assert (folder / "error.txt").read_text() == f"{first.value}\n"
    assert str(hf_model("moe")) in (folder / "config.yaml").read_text()

    weights = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
    again = Policy(config, cpu_platform, one_rank)
    path: Any = Checkpointer(str(folder), config.checkpoint).find()
    assert Checkpointer(str(folder), config.checkpoint).load(path, again).step == 6
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.hf_tensors())
    loaded = load_failed_micro_batches(folder, 0)
    assert all(same(a, b) for a, b in zip(bad, loaded, strict=True))
    with pytest.raises(NumericsError) as second:
        again.train_step(loaded, StepTimer())
    assert str(second.value) == str(first.value)
    assert "the loss, on rank 0, sequence 2" in str(first.value)

    tool = [sys.executable, str(ROOT / "tools" / "replay_failure.py"), str(folder)]
    done = subprocess.run(tool, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (1, f"NumericsError: {first.value}\n"), done.stderr
