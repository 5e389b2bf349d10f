"""Where a run starts, and what becomes of what an earlier process wrote. tests/integration runs the loop."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from megatron_drpo.checkpoint.checkpointer import Checkpointer, RunState
from megatron_drpo.config.schema import CheckpointConfig, Config, DataConfig, Mode, PolicyConfig
from megatron_drpo.errors import CheckpointError
from megatron_drpo.losses.base import Loss
from megatron_drpo.losses.drpo import DrpoLoss
from megatron_drpo.losses.objective import Objective
from megatron_drpo.losses.sft import SftLoss
from megatron_drpo.losses.surrogate import SurrogateLoss
from megatron_drpo.losses.tokens import LossTokens
from megatron_drpo.metrics.diagnostics import compute_diagnostics
from megatron_drpo.metrics.faulty_tokens import FaultyToken
from megatron_drpo.metrics.progress import Progress
from megatron_drpo.metrics.sample_statistics import SampleStatistics
from megatron_drpo.metrics.writer import MetricsWriter, read_metrics
from megatron_drpo.policy.parallel import ParallelState
from megatron_drpo.policy.policy import UpdateResult
from megatron_drpo.step.leader_wait import CollectiveWait
from megatron_drpo.trainer import Trainer
from megatron_drpo.types import Origin, TrainSequence


class SavedStates(Checkpointer):
    """Checkpoints without tensors: folders that hold a run state, of the run that has claimed the folder."""

    def load(
        self, path: Path, policy: object, show: Callable[[str], None] = lambda message: None
    ) -> RunState:
        return RunState(**json.loads((path / "run_state.json").read_text()))

    def put(self, state: RunState) -> Path:
        path = self.folder / f"step_{state.step:06d}"
        self.claim()
        path.mkdir(parents=True)
        (path / "run_state.json").write_text(json.dumps(vars(state) | {"run_id": self.run_id}))
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
                publisher=None,
                wait=CollectiveWait(None),
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
    shutil.rmtree(killed_run / "checkpoints" / "step_000002")
    (killed_run / "checkpoints" / "latest").unlink()
    assert start(killed_run).state == RunState()
    assert steps_of(killed_run) == ([], [])


def test_a_run_without_latest_goes_on_from_its_own_checkpoint(
    start: Callable[..., Trainer], killed_run: Path
) -> None:
    (killed_run / "checkpoints" / "latest").unlink()
    assert start(killed_run).state.step == 2
    assert steps_of(killed_run) == ([1, 2], ["1", "2"])
    assert (killed_run / "checkpoints" / "latest").read_text() == "step_000002\n"


def test_a_run_that_starts_over_does_not_come_back_to_the_earlier_one(
    start: Callable[..., Trainer], killed_run: Path
) -> None:
    assert start(killed_run, resume=False).state == RunState()
    assert steps_of(killed_run) == ([], [])
    with pytest.raises(CheckpointError, match="step_000002 is of another run"):
        start(killed_run)  # killed before its first save, then resumed
    assert start(killed_run, resume=False).state == RunState()
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


def update_of(num_outside: int, objective: Objective) -> UpdateResult:
    """Of ten tokens, so many of them outside |pi - mu| <= 0.1."""
    logmu_N = torch.full((10,), 0.5, dtype=torch.float64).log()
    tokens = LossTokens(
        logprobs_N=torch.where(torch.arange(10) < num_outside, math.log(0.8), math.log(0.55)),
        anchor_logprobs_N=logmu_N,
        rollout_logprobs_N=logmu_N,
        advantages_N=torch.ones(10),
    )
    diagnostics = compute_diagnostics(tokens, torch.zeros(10), objective)
    return UpdateResult(loss=0.0, grad_norm=1.0, lr=1e-6, diagnostics=diagnostics)


@pytest.mark.parametrize(
    ("loss", "mode", "outside", "alarms"),
    [
        (DrpoLoss(delta=0.1), Mode.rl, 0, {50: "0 of 1.0k loss", 100: "0 of 1.0k loss"}),
        (DrpoLoss(delta=0.1), Mode.rl, 1, {}),
        (DrpoLoss(delta=0.1), Mode.rl, 6, {50: "60.0% of 1.0k loss", 100: "60.0% of 1.0k loss"}),
        (SurrogateLoss(), Mode.rl, 0, {}),
        (SftLoss(), Mode.sft, 0, {}),
    ],
)
def test_a_trust_region_that_does_not_bind_is_said(
    start: Callable[..., Trainer],
    tmp_path: Path,
    loss: Loss,
    mode: Mode,
    outside: int,
    alarms: dict[int, str],
) -> None:
    """Two updates a step; in metrics.jsonl and on the screen, after 50 steps and after 50 more."""
    trainer = start(tmp_path / "run")
    trainer.config.train.mode = mode
    stream = io.StringIO()
    objective = Objective(loss=loss)
    policy: Any = SimpleNamespace(objective=objective)
    trainer.policy = policy
    trainer.progress = Progress(120, live=False, console=Console(file=stream))
    with MetricsWriter(tmp_path / "run", tensorboard=False) as trainer.writer:
        for step in range(1, 121):
            updates = [update_of(outside, objective) for _ in range(2)]
            trainer._report(step, trainer._update_metrics(updates))
    found = {
        record["step"]: record["alarm"] for record in read_metrics(tmp_path / "run") if "alarm" in record
    }
    assert found.keys() == alarms.keys()
    assert all(found[step].startswith(text) for step, text in alarms.items())
    shown = [line for line in stream.getvalue().splitlines() if line.startswith("warning: ")]
    assert shown == [f"warning: {text}" for text in found.values()]


def test_rewards_without_signal_are_said(
    start: Callable[..., Trainer], tmp_path: Path, one_rank: ParallelState
) -> None:
    trainer = start(tmp_path / "run")
    stream = io.StringIO()
    policy: Any = SimpleNamespace(objective=None, parallel=one_rank)
    trainer.policy = policy
    trainer.progress = Progress(20, live=False, console=Console(file=stream))
    statistics = SampleStatistics(num_groups_scored=2, num_groups_varied=0)
    for _ in range(4):
        statistics.count(5, 7, reward=0.0, truncated=True)
    with MetricsWriter(tmp_path / "run", tensorboard=False) as trainer.writer:
        for step in range(1, 13):
            trainer._report(step, trainer._sample_metrics(statistics))
    records = read_metrics(tmp_path / "run")
    assert {record["reward/varied_groups_share"] for record in records} == {0.0}
    alarms = {record["step"]: record["alarm"] for record in records if "alarm" in record}
    assert alarms.keys() == {10}
    assert alarms[10].startswith("all 40 rewards of 10 steps are 0: ")
    assert "100% of the responses are cut off" in alarms[10]
    assert f"warning: {alarms[10]}" in stream.getvalue().splitlines()


def test_faulty_tokens_are_counted_shown_and_named(
    start: Callable[..., Trainer], tmp_path: Path, one_rank: ParallelState
) -> None:
    trainer = start(tmp_path / "run")
    stream = io.StringIO()
    objective = Objective(loss=SurrogateLoss())
    policy: Any = SimpleNamespace(objective=objective, parallel=one_rank)
    trainer.policy = policy
    trainer.progress = Progress(2, live=False, console=Console(file=stream))
    origin = Origin(where="prompt 16 (line 17), sample 1", servers=(("http://a", 4), ("http://b", 3)))
    sequence = TrainSequence(
        id=5,
        token_ids=torch.arange(9),
        prompt_length=2,
        advantages=torch.ones(7),
        rollout_logprobs=torch.zeros(7),
        loss_mask=torch.ones(7, dtype=torch.bool),
        origin=origin,
    )
    fault = FaultyToken(replica=0, sequence_id=5, position=4, logprob=-0.5, rollout_logprob=-27.6)
    with MetricsWriter(tmp_path / "run", tensorboard=False) as trainer.writer:
        for step, num_faulty in ((1, 1), (2, 0)):
            first_update = replace(update_of(0, objective), faulty=[fault] * num_faulty)
            updates = [first_update, update_of(0, objective)]
            trainer._tell_faults(updates, [sequence])
            trainer._report(step, trainer._update_metrics(updates))
    first, second = read_metrics(tmp_path / "run")
    assert (first["mismatch/faulty_tokens"], second["mismatch/faulty_tokens"]) == (1, 0)
    place = "prompt 16 (line 17), sample 1, response token 4 (log pi -0.5, log mu -27.6) of http://b"
    assert first["alarm"].startswith("1 faulty token was kept out of the loss (http://b: 1): ")
    assert place in first["alarm"]
    assert "alarm" not in second
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == [f"warning: {first['alarm']}"]
    assert ["faulty tokens 1" in line for line in lines if line.startswith("step ")] == [True, False]
