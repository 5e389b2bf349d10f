"""Where a run starts, and what becomes of what an earlier process wrote. tests/integration runs the loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_drpo.checkpoint import Checkpointer, RunState
from megatron_drpo.config import CheckpointConfig, Config, DataConfig, PolicyConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.metrics.writer import MetricsWriter
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.trainer import Trainer


class SavedStates(Checkpointer):
    """Checkpoints without tensors: folders that hold a run state."""

    def load(self, path: Path, policy: object) -> RunState:
        return RunState(**json.loads((path / "run_state.json").read_text()))

    def put(self, state: RunState) -> Path:
        path = self.folder / f"step_{state.step:06d}"
        path.mkdir(parents=True)
        (path / "run_state.json").write_text(json.dumps(vars(state)))
        (self.folder / "latest").write_text(path.name + "\n")
        return path


@pytest.fixture
def start(one_rank: ParallelState) -> Callable[..., Trainer]:
    """`start(run_dir, **checkpoint_fields)`: a trainer that has found out where its run stands."""

    def run(run_dir: Path, **fields: Any) -> Trainer:
        config = Config(
            run_dir=str(run_dir),
            data=DataConfig(train_path="unused"),
            policy=PolicyConfig(model_path="unused"),
            checkpoint=CheckpointConfig(**fields),
        )
        policy: Any = None
        with MetricsWriter(run_dir, tensorboard=False) as writer:
            trainer = Trainer(
                config,
                policy,
                SavedStates(str(run_dir), config.checkpoint),
                share=None,
                experience=None,
                evaluator=None,
                pusher=None,
                writer=writer,
                progress=None,
            )
            trainer._resume()
        return trainer

    return run


@pytest.fixture
def killed_run(tmp_path: Path) -> Path:
    """A run that was killed after its third step and had saved after the second."""
    run_dir = tmp_path / "run"
    (run_dir / "rollouts").mkdir(parents=True)
    positions = {}
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss/value": float(step)})
            positions[step] = writer.position
            (run_dir / "rollouts" / f"step_{step:06d}.jsonl").touch()
    state = RunState(step=2, policy_version=2, metrics_position=positions[2])
    SavedStates(str(run_dir), CheckpointConfig()).put(state)
    return run_dir


def steps_of(run_dir: Path) -> tuple[list[int], list[str]]:
    """Of the metrics and of the rollouts."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rollouts = sorted(path.stem.removeprefix("step_00000") for path in (run_dir / "rollouts").glob("*"))
    return [json.loads(line)["step"] for line in lines], rollouts


def test_a_resumed_run_forgets_the_steps_after_its_checkpoint(
    start: Callable[..., Trainer], killed_run: Path
) -> None:
    trainer = start(killed_run)
    assert (trainer.state.step, trainer.state.policy_version) == (2, 2)
    assert steps_of(killed_run) == ([1, 2], ["1", "2"])


def test_a_run_killed_before_its_first_save_starts_from_nothing(
    start: Callable[..., Trainer], killed_run: Path
) -> None:
    (killed_run / "checkpoints" / "latest").unlink()
    assert start(killed_run).state == RunState()
    assert steps_of(killed_run) == ([], [])


def test_a_run_that_starts_over_does_not_come_back_to_the_earlier_one(
    start: Callable[..., Trainer], killed_run: Path
) -> None:
    assert start(killed_run, resume=False).state == RunState()
    assert steps_of(killed_run) == ([], [])
    assert start(killed_run).state == RunState(), "killed before its first save, then resumed"
    assert (killed_run / "checkpoints" / "step_000002").is_dir()


def test_a_run_that_continues_another_one_has_its_own_metrics(
    start: Callable[..., Trainer], killed_run: Path, tmp_path: Path
) -> None:
    other = str(killed_run / "checkpoints" / "step_000002")
    assert start(tmp_path / "new", load_path=other).state.step == 2
    assert (tmp_path / "new" / "metrics.jsonl").read_bytes() == b""
    assert steps_of(killed_run) == ([1, 2, 3], ["1", "2", "3"]), "the other run's stay as they are"


def test_going_back_within_a_run_keeps_what_was_before(
    start: Callable[..., Trainer], killed_run: Path
) -> None:
    path = str(killed_run / "checkpoints" / "step_000002")
    assert start(killed_run, resume=False, load_path=path).state.step == 2
    assert steps_of(killed_run) == ([1, 2], ["1", "2"])


def test_metrics_that_are_gone_are_missed(start: Callable[..., Trainer], killed_run: Path) -> None:
    (killed_run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: the checkpoint was saved when this file had"):
        start(killed_run)
